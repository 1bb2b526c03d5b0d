"""Labels through a state-space mixer: which of its channels, heads and states belong together.

Rules beside those of `labels`: a causal convolution keeps channels apart, a scan couples what is one head, or one
channel, with its time step, decay and skip, and B with C, state by state. Scans are known by the names of their
arguments (dt, A, B, C), which the kernels of the field share.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..labels import NO_LABEL, Labelling, NodeRules, tensors_in

_SCANNED = ("dt", "A", "B", "C")
_BIASES = ("dt_bias", "delta_bias")


@dataclass(frozen=True)
class Scan:
    """One scan: labels of its heads [h], or of its channels [d], and of its states [groups, n].

    heads    x has an axis of heads, whose channels share one time step; else every channel has its own
    """

    node: fx.Node
    heads: bool
    items: np.ndarray
    states: np.ndarray


@dataclass(frozen=True)
class Span:
    """A norm behind the scan whose statistics run over `size` channels at a time, as its `attribute` says."""

    module: str
    attribute: str
    size: int
    channels: int


@dataclass
class ScanLabelling(Labelling):
    scans: list[Scan] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)  # why a scan is not understood


def label_mixer(graph: fx.Graph, mixer: nn.Module) -> ScanLabelling:
    """Run a mixer's graph on labels; its first placeholder is what it is given."""
    out = ScanLabelling()
    stream = next(node.name for node in graph.nodes if node.op == "placeholder")
    for node in graph.nodes:
        if node.op != "output":
            step = _ScanStep(out, mixer, node)
            try:
                out.values[node] = step.label_node(stream)
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError):
                out.values[node] = step.block_unknown_operation(f"`{node.name}`")
    return out


class _ScanStep(NodeRules):
    """One node of a mixer; parameters of more axes than one are labelled along the first."""

    out: ScanLabelling

    def label_attribute(self) -> Any:
        member = self.root
        for name in self.node.target.split("."):
            member = getattr(member, name)
        if isinstance(member, nn.Parameter) and member.ndim > 1:
            labels = self.claim("", 0, self.out.new_labels(len(member)))
            return labels.view(-1, *[1] * (member.ndim - 1)).expand(member.shape)
        return super().label_attribute()

    def label_function(self, name: str) -> Any:
        role = self.node.meta.get("role")
        if role == "ssm_conv":
            return self.label_causal_convolution()
        if role == "padding":
            return self.args[0]
        if role == "ssm_scan":
            return self.label_scan()
        if name == "matmul" and source_parameter(self.node.args[0]) is not None:
            return self.label_parameter_product()
        return super().label_function(name)

    def label_module(self, module: nn.Module) -> Any:
        if self.node.meta.get("role") == "norm":
            return self.label_norm_in_mixer(module)
        return super().label_module(module)

    def label_causal_convolution(self) -> Tensor:
        """x [b, c, t] and a filter per channel: channels stay apart."""
        x = self.args[0]
        for weight in tensors_in((self.args[1:], self.kwargs)):
            self.out.couple(x, weight.flatten(1).amax(1).view(1, -1, 1) if weight.ndim > 1 else weight.view(1, -1, 1))
        return x

    def label_parameter_product(self) -> Tensor:
        """A parameter [n, k] times [b, k, t]: reads k channels, gives n."""
        rows, x = self.args
        parameter = source_parameter(self.node.args[0])
        assert parameter is not None, f"{self.node.name} multiplies by no parameter"
        self.claim_at(parameter, 1, x.amax((0, 2)), is_read=True)
        return rows[:, :1].expand(x.shape[0], -1, x.shape[-1])

    def claim_at(self, tensor: str, axis: int, labels: Tensor, is_read: bool = False) -> None:
        current, self.node = self.node, next(n for n in self.node.graph.nodes if n.target == tensor)
        try:
            self.claim("", axis, labels, is_read)
        finally:
            self.node = current

    # -- scans -----------------------------------------------------------------------------------------------

    def label_scan(self) -> Any:
        arguments, nodes = (
            self.arguments_by_name(self.args, self.kwargs),
            self.arguments_by_name(self.node.args, self.node.kwargs),
        )
        if not all(isinstance(arguments.get(name), Tensor) for name in _SCANNED):
            self.out.unsupported.append(f"`{self.node.target.__name__}` is a scan of another kind than dt, A, B, C")
            return self.block_unknown_operation(f"`{self.node.target.__name__}`")
        x = next(iter(arguments.values()))
        for bias in _BIASES:
            arguments["bias"] = arguments.pop(bias, None) if arguments.get(bias) is not None else arguments.get("bias")
        return self.label_head_scan(x, arguments) if x.ndim == 4 else self.label_channel_scan(x, arguments, nodes)

    def arguments_by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        target: Any = getattr(self.node.target, "__effc_original__", self.node.target)
        names = list(inspect.signature(inspect.unwrap(target)).parameters)
        return dict(zip(names, args, strict=False)) | kwargs

    def label_head_scan(self, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        """x [b, t, h, p], dt [b, t, h], A, D and the bias [h], B and C [b, t, groups, n]."""
        self.out.couple_along(x.permute(2, 0, 1, 3).flatten(1), 1)
        heads = x.amax((0, 1, 3))
        self.out.couple(arguments["dt"].amax((0, 1)), heads)
        for name in ("A", "D", "bias"):
            if isinstance(arguments.get(name), Tensor):
                self.out.couple(arguments[name].reshape(len(heads), -1).amax(1), heads)
        self.couple_with_gate(x, arguments)
        states = arguments["B"].amax((0, 1))
        self.out.couple(arguments["C"].amax((0, 1)), states)
        self.out.scans.append(Scan(self.node, True, heads.numpy(), states.numpy()))
        return x

    def label_channel_scan(self, x: Tensor, arguments: dict[str, Any], nodes: dict[str, Any]) -> Tensor:
        """x and dt [b, d, t], A [d, n], D and the bias [d], B and C [b, n, t]."""
        channels = x.amax((0, 2))
        self.out.couple(arguments["dt"], x)
        for name in ("A", "D", "bias"):
            if isinstance(arguments.get(name), Tensor):
                self.out.couple(arguments[name].reshape(len(channels), -1).amax(1), channels)
        self.couple_with_gate(x, arguments)
        states = arguments["B"].amax((0, 2))
        self.out.couple(arguments["C"].amax((0, 2)), states)
        decay = source_parameter(nodes["A"])
        if decay is None:
            self.out.block_pruning_of(states, "the decay of its states is computed")
        else:
            self.claim_at(decay, 1, states)
        self.out.scans.append(Scan(self.node, False, channels.numpy(), states[None].numpy()))
        return x

    def couple_with_gate(self, x: Tensor, arguments: dict[str, Any]) -> None:
        if isinstance(arguments.get("z"), Tensor):
            self.out.couple(arguments["z"], x)

    # -- norms -----------------------------------------------------------------------------------------------

    def label_norm_in_mixer(self, module: nn.Module) -> Tensor:
        """Its statistics run over the channels or states that are left: what goes changes the scale of the others."""
        x, *gates = tensors_in((self.args, self.kwargs))
        for other in gates:
            self.out.couple(x, other)
        channels = x.reshape(-1, x.shape[-1]).amax(0)
        for name, parameter in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if parameter.ndim == 1 and len(parameter) == len(channels):
                self.claim(name, 0, channels)
        sizes = {
            name: value
            for name, value in vars(module).items()
            if type(value) is int and value > 1 and name != "training" and len(channels) % value == 0
        }
        for name, size in sizes.items():
            self.out.spans.append(Span(str(self.node.target), name, size, len(channels)))
        return torch.where(x == NO_LABEL, gates[0], x) if gates else x


def source_parameter(node: Any) -> str | None:
    """The parameter that a value is made of by functions of one argument: `-exp(A_log.float())`."""
    while isinstance(node, fx.Node) and node.op in ("call_function", "call_method"):
        if len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None

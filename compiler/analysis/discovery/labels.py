"""Labels: the channel of a tensor that each number of an activation comes from.

A unit's graph is run once on integer *labels* instead of numbers: every output row of a weight gets a label
of its own, views, splits and transposes move labels by being executed on them, elementwise functions couple
the labels that meet, norms and softmaxes couple all along their axis, and a contracting module reads labels
at its columns. No values are needed, so a model on the meta device will do.

The alternative, one NaN per channel through the real weights, takes seconds per layer and loses the NaN in
fused attention kernels.
"""

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from ...ir.graphs import target_name
from ...ir.layers.linear import KernelLinear
from ...ir.layers.reft import Reft
from . import attention_rules, image_rules, packed_rules
from .experts import overrides_forward_of_torch_layer, trace_leaf_module
from .labelling import (
    EXTREMES,
    MIXES,
    MOVES,
    NEW_TENSOR_METHODS,
    NO_LABEL,
    POINTWISE,
    PRODUCTS,
    REDUCES,
    STREAM,
    Labelling,
    tensors_in,
    unlabelled_like,
)

_MISFITS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError)


def label_graph(graph: fx.Graph, root: nn.Module, stream: str | None, out: Labelling | None = None) -> Labelling:
    """Run the graph of the unit `root` on labels; `stream` names the placeholder of the residual stream, if any."""
    out = out or Labelling()
    result = LabelInterpreter(out, root, stream=stream).run(graph)
    label_sets = [x.numpy().ravel() for x in tensors_in(result)]
    out.output = np.unique(np.concatenate(label_sets)) if label_sets else out.output
    return out


class LabelInterpreter:
    """Interpreter of one graph on labels, as `fx.Interpreter` is of one on tensors.

    prefix     path of the graph's root below the unit
    arguments  labels of placeholders, by name
    stream     the placeholder of the residual stream
    """

    def __init__(
        self,
        out: Labelling,
        root: nn.Module,
        arguments: Mapping[str, Any] | None = None,
        prefix: str = "",
        stream: str | None = None,
    ):
        self.out, self.root, self.arguments, self.prefix, self.stream = out, root, arguments or {}, prefix, stream

    def run(self, graph: fx.Graph) -> Any:
        """The labels of what the graph returns."""
        for node in graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], self.out.values.__getitem__)
            rules = NodeRules(self.out, self.root, node, self)
            try:
                self.out.values[node] = rules.label_node(self.stream)
            except _MISFITS:
                # The arguments have another form than the rule for this name expects: it is some other function.
                self.out.values[node] = rules.block_unknown_operation(f"`{target_name(node)}`")
        raise AssertionError("a graph without an output")

    def label_opened_module(self, graph: fx.Graph, module: nn.Module, path: str, args: tuple, kwargs: Mapping) -> Any:
        """The labels that come out of a module that was opened, given its call's arguments."""
        names = [n.name for n in graph.nodes if n.op == "placeholder"]
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        return LabelInterpreter(self.out, module, arguments, path).run(graph)


class NodeRules:
    """One node of a run: its arguments as labels, and the rules."""

    def __init__(self, out: Labelling, root: nn.Module, node: fx.Node, interpreter: LabelInterpreter | None = None):
        self.out, self.root, self.node, self.interpreter = out, root, node, interpreter or LabelInterpreter(out, root)
        # Labels, sizes, modules: whatever the call is given when it runs. A rule that expects others has a misfit.
        self.args: tuple[Any, ...] = tuple(fx.map_arg(node.args, out.values.__getitem__))
        self.kwargs: dict[str, Any] = dict(fx.map_arg(node.kwargs, out.values.__getitem__))

    def submodule_path(self, path: str) -> str:
        """A path below the root of this graph, as one below the unit."""
        return ".".join(part for part in (self.interpreter.prefix, path) if part)

    @property
    def path(self) -> str:
        """Of the module or parameter that the node names."""
        return self.submodule_path(str(self.node.target))

    def label_node(self, stream: str | None) -> Any:
        node = self.node
        if node.op == "placeholder":
            argument = self.interpreter.arguments.get(node.name)
            labels = unlabelled_like(node.meta.get("shape")) if argument is None else argument
            return labels.fill_(STREAM) if node.name == stream else labels
        if node.op == "get_attr":
            return self.label_attribute()
        if node.op == "call_module":
            return self.label_module(self.root.get_submodule(str(node.target)))
        return self.label_function(target_name(node))

    def label_attribute(self) -> Any:
        """A parameter, or a buffer of numbers, that is read directly has labels of its own."""
        member = self.root
        for name in str(self.node.target).split("."):
            member = getattr(member, name)
        if not isinstance(member, Tensor):
            return self.node
        if not isinstance(member, nn.Parameter) and not member.is_floating_point():
            return unlabelled_like(member.shape)
        if member.ndim == 0 and not self.out.norms_couple:
            return unlabelled_like(())
        if member.ndim == 1:
            return self.claim("", 0, self.out.new_labels(len(member)))
        return packed_rules.label_weight(self, member)

    def label_function(self, name: str) -> Any:
        rule = _LEAVES.get(name) or _LEAVES.get(self.node.meta.get("role", ""))
        if rule is not None:
            return rule(self)
        if packed_rules.weights_in((self.args, self.kwargs)):
            return packed_rules.label_function_of_weight(self, name)
        labelled = list(tensors_in((self.args, self.kwargs)))
        if name in EXTREMES and labelled:
            return self.label_pointwise(labelled) if len(labelled) > 1 else self.label_extreme(labelled[0])
        if name in NEW_TENSOR_METHODS:
            return unlabelled_like(self.node.meta.get("shape"))
        if name in MOVES or (not labelled and _is_plain(self.node)):
            return self.run_on_labels()
        if name in POINTWISE and not labelled and all(type(x) in (int, float) for x in self.args):
            return torch.as_tensor(self.run_on_labels()).item()  # of sizes, as `torch.div` of a length
        if name in POINTWISE:
            return self.label_pointwise(labelled[:1] if name == "type_as" else labelled)  # the other says a type alone
        if name in MIXES | REDUCES and labelled:
            return self.label_reduction(name, labelled[0])
        if name in PRODUCTS and all(x.ndim > 1 for x in labelled):
            return self.label_matrix_product(labelled)
        return self.block_unknown_operation(f"`{name}`")

    def run_on_labels(self) -> Any:
        target = self.node.target
        if target is operator.getitem and packed_rules.selects_by_tensor(self.args[1]):
            return packed_rules.couple_indexed_axes(self, *self.args)
        if self.node.op == "call_method":
            return getattr(self.args[0], str(target))(*self.args[1:], **self.kwargs)
        if target is getattr and self.args[1] == "dtype":
            return self.node.meta.get("dtype")
        assert not isinstance(target, str), f"{target} is no function"
        return target(*self.args, **self.kwargs)

    def label_pointwise(self, inputs: list[Tensor]) -> Any:
        if not inputs:
            return unlabelled_like(self.node.meta.get("shape"))
        wide = inputs if self.out.norms_couple else [x for x in inputs if not _holds_one_channel(x)]
        if any(x.ndim and x.shape[-1] > 1 for x in wide):  # a gate of one row scales all channels and ties none
            inputs = wide
        labels = inputs[0]
        for other in inputs[1:]:
            self.out.couple(labels, other)
            labels, other = torch.broadcast_tensors(labels, other)
            labels = torch.where(labels == NO_LABEL, other, labels)
        return labels

    def label_reduction(self, name: str, x: Tensor) -> Any:
        if "softmax" in name:
            self.out.weighed.append(np.unique(x.numpy()))
        axes = self.normalised_or_reduced_axes(name, x)
        for axis in axes:
            self.out.couple_along(x, axis)
        if name in MIXES:
            return x
        keep = self.kwargs.get("keepdim", self.args[2] if len(self.args) > 2 else False) is True
        return x.amax(axes, keepdim=keep)

    def label_extreme(self, x: Tensor) -> Any:
        """The largest or smallest along one axis and where it is, or of all."""
        if not isinstance(self.node.meta["dtype"], tuple):
            return self.label_reduction("amax", x)
        axis: Any = self.kwargs.get("dim", self.args[1] if len(self.args) > 1 else None)
        self.out.couple_along(x, axis)
        keep = self.kwargs.get("keepdim", self.args[2] if len(self.args) > 2 else False)
        return x.amax(axis, keepdim=keep), unlabelled_like(self.node.meta["shape"][1])

    def normalised_or_reduced_axes(self, name: str, x: Tensor) -> tuple[int, ...]:
        sizes = "normalized_shape" if name in ("layer_norm", "rms_norm") else "dim"
        axes = self.args[1] if len(self.args) > 1 else self.kwargs.get(sizes)
        if axes is None:
            return tuple(range(x.ndim))
        if sizes == "normalized_shape":
            return tuple(range(-len(axes), 0))
        return (axes,) if isinstance(axes, int) else tuple(axes)

    def label_module(self, module: nn.Module) -> Any:
        x: Any = next(tensors_in((self.args, self.kwargs)), None)
        kind = type(module).__name__
        runs = type(module).forward  # a subclass with another forward is something else
        if runs is nn.Linear.forward and isinstance(module, nn.Linear):
            return self.label_matmul(x, module, out_axis=0)
        if runs is Conv1D.forward and isinstance(module, Conv1D):
            return self.label_matmul(x, module, out_axis=1)
        if runs in image_rules.CONVOLUTIONS and isinstance(module, _ConvNd):
            return image_rules.label_convolution_module(self, x, module)
        if isinstance(module, image_rules.MOVING):
            return module(x)
        if runs in image_rules.POOLS:
            return image_rules.label_pooling(self, x)
        if isinstance(module, image_rules.NORMS):
            return image_rules.label_channel_norm(self, x, module)
        if "Norm" in kind:
            return self.label_norm(x, module)
        if isinstance(module, Reft):  # mixes the channels of a stream, and hands it on
            self.out.couple_along(x, -1)
            return x
        if runs is nn.Embedding.forward and isinstance(module, nn.Embedding):
            rows = self.claim("weight", 1, self.out.new_labels(module.embedding_dim))
            return rows.expand(*x.shape, -1)
        if _is_pointwise_module(module) and all(p.numel() == 1 for p in module.parameters()):
            return x
        if runs is nn.PReLU.forward and isinstance(module, nn.PReLU):  # a slope for each channel of [b, c, ...]
            self.out.couple(self.claim("weight", 0, self.out.new_labels(len(module.weight))), x.movedim(1, -1))
            return x
        reason = ""
        if self.node.meta.get("role") == "rotary_embedding":
            return attention_rules.label_mask(self)
        if (inner := self.out.inner_graphs.get(self.path)) is not None:
            return self.interpreter.label_opened_module(inner, module, self.path, self.args, self.kwargs)
        if self.node.meta.get("role") in ("experts", "router") or overrides_forward_of_torch_layer(module):
            graph, reason = trace_leaf_module(module, self.node, self.args, self.kwargs)
            if graph is not None:
                return self.interpreter.label_opened_module(graph, module, self.path, self.args, self.kwargs)
        if isinstance(module, KernelLinear):
            self.out.rejected.append((self.path, "its weight is packed for a kernel"))
        elif next(module.parameters(), None) is not None:
            self.out.rejected.append((self.path, f"a {kind} is taken as a whole{reason}"))
        return self.block_unknown_operation(f"{kind} {self.path}")

    def claim(self, name: str, axis: int, labels: Tensor, is_read: bool = False) -> Tensor:
        """Note a claim of a parameter of the module that is called, or of the one that is read."""
        return self.out.claim_axis(f"{self.path}.{name}" if name else self.path, axis, labels, is_read)

    def label_matmul(self, x: Tensor, module: nn.Linear | Conv1D, out_axis: int) -> Tensor:
        """A matrix product: reads its input's labels at its columns and gives its rows new ones."""
        flat = x.reshape(-1, x.shape[-1])
        self.out.couple_along(flat, 0)
        self.claim("weight", 1 - out_axis, flat.amax(0), is_read=True)
        rows = self.claim("weight", out_axis, self.out.new_labels(module.weight.shape[out_axis]))
        if module.bias is not None:
            self.claim("bias", 0, rows)
        return rows.expand(*x.shape[:-1], -1)

    def label_norm(self, x: Tensor, module: nn.Module) -> Tensor:
        """A norm's statistics run over the axes of its weight: what shares them can't be parted, unless it follows."""
        weight = next(module.parameters(), None)
        if not self.out.norms_couple and all(p.shape == x.shape[-1:] for p in module.parameters()):
            for name, _ in module.named_parameters():
                self.claim(name, 0, x.reshape(-1, x.shape[-1])[0])
            return x
        for axis in range(1, 1 + (weight.ndim if weight is not None else 1)):
            self.out.couple_along(x, -axis)
        return x

    def block_unknown_operation(self, operation: str) -> Any:
        """No rule: what goes in can't be narrowed, nor what its result meets."""
        reason = f"{operation} does something unknown with its channels"
        result = unlabelled_like(self.node.meta.get("shape"))
        if any((x > NO_LABEL).any() for x in tensors_in((self.args, self.kwargs))):
            self.out.block_pruning_of((self.args, self.kwargs), reason)
            mark = self.out.new_labels(1)
            self.out.block_pruning_of(mark, reason)
            for x in tensors_in(result):
                x.fill_(int(mark))
        return result

    def label_matrix_product(self, inputs: list[Tensor]) -> Tensor:
        """[..., n, k] @ [..., k, m]: the contracted channels belong together, and so do those they meet."""
        *added, left, right = inputs
        self.out.couple_along(left, -1)
        self.out.couple_along(right, -2)
        return self.label_pointwise([right.amax(-2, keepdim=True), left.amax(-1, keepdim=True), *added])


_LEAVES = {**attention_rules.RULES, **image_rules.RULES, **packed_rules.RULES}


def _holds_one_channel(x: Tensor) -> bool:
    """Whether all positions hold one number of one channel."""
    return x.ndim > 1 and x.shape[-1] == 1 and bool((x == x.flatten()[:1]).all()) and bool((x > NO_LABEL).any())


def _is_plain(node: fx.Node) -> bool:
    """Whether the node computes with sizes and Python values only."""
    return node.op == "call_function" and node.target.__module__ in ("_operator", "builtins", "math")


def _is_pointwise_module(module: nn.Module) -> bool:
    home = type(module).__module__
    mixing = isinstance(module, (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.GLU))
    return not mixing and (
        isinstance(module, nn.Identity)
        or home.startswith(("torch.nn.modules.activation", "torch.nn.modules.dropout", "transformers.activations"))
    )

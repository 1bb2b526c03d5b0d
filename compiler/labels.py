"""Which channel of which tensor does each number of an activation come from.

A unit's graph is run once on integer *labels* instead of numbers: every output row of a weight gets a label
of its own, views, splits and transposes move labels by being executed on them, elementwise functions couple
the labels that meet, norms and softmaxes couple all along their axis, and a contracting module reads labels
at its columns. No values are needed, so a model on the meta device will do.

The alternative, one NaN per channel through the real weights, takes seconds per layer and loses the NaN in
fused attention kernels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from transformers.pytorch_utils import Conv1D

NOTHING = 0                        # masks, angles, constants: they constrain nobody
STREAM = 1                         # the residual stream that enters the unit
FIRST = 2

MOVES = frozenset((
    "view", "reshape", "view_as", "reshape_as", "transpose", "swapaxes", "permute", "movedim", "contiguous",
    "clone", "detach", "split", "chunk", "tensor_split", "getitem", "cat", "concat", "concatenate", "stack",
    "unsqueeze", "squeeze", "expand", "expand_as", "flatten", "unflatten", "unbind", "narrow", "select", "repeat",
    "repeat_interleave", "flip", "roll", "t", "T", "mT", "getattr", "size", "dim", "numel",
    "split_with_sizes", "index_select", "pad"))
POINTWISE = frozenset((
    "to", "float", "half", "bfloat16", "double", "type", "type_as", "relu", "gelu", "silu", "mish",
    "sigmoid", "tanh", "exp", "log", "neg", "rsqrt", "sqrt", "square", "pow", "abs", "clamp", "clip", "sin",
    "cos", "softplus", "relu6", "leaky_relu", "elu", "hardswish", "hardtanh", "logsigmoid", "erf",
    "dropout", "add", "sub", "mul", "truediv", "div", "iadd", "isub", "imul", "itruediv", "add_", "sub_",
    "mul_", "div_", "true_divide", "maximum", "minimum", "where", "masked_fill", "masked_fill_", "lerp",
    "addcmul", "zeros_like", "ones_like", "rsub"))
MIXES = frozenset((
    "softmax", "log_softmax", "layer_norm", "rms_norm", "normalize", "cumsum"))
PRODUCTS = frozenset(("matmul", "bmm", "baddbmm"))
_MISFITS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError)
REDUCES = frozenset((
    "mean", "sum", "var", "std", "amax", "amin", "logsumexp", "norm"))


@dataclass(frozen=True)
class Claim:
    """The labels along one axis of a parameter: its rows where it writes, its columns where it reads."""

    tensor: str                    # below the unit: "mlp.gate_proj.weight"
    axis: int
    labels: np.ndarray
    reads: bool                    # whether these are the columns of a contraction


@dataclass(frozen=True)
class Attention:
    """One attention call: a label of each query head and of each KV head."""

    node: fx.Node
    module: str                    # below the unit
    q: np.ndarray
    kv: np.ndarray


@dataclass
class Labelling:
    """What a run over a unit found. `values` holds the labels of every node."""

    claims: list[Claim] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    weighed: list[np.ndarray] = field(default_factory=list)   # labels under a softmax: attention written out
    refused: list[tuple[str, str]] = field(default_factory=list)     # (module, why nothing is known of it)
    blocked: list[tuple[np.ndarray, str]] = field(default_factory=list)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    count: int = FIRST
    edges: list[np.ndarray] = field(default_factory=list)         # each [2, n]: labels that belong together
    output: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))     # labels of what is returned

    def fresh(self, size: int) -> Tensor:
        self.count += size
        return torch.arange(self.count - size, self.count, dtype=torch.int64)

    def couple(self, left: Tensor, right: Tensor) -> None:
        """Labels at the same place, after broadcasting, belong together."""
        left, right = (x.reshape(-1).numpy() for x in torch.broadcast_tensors(left, right))
        meet = (left != right) & (left > NOTHING) & (right > NOTHING)
        if meet.any():
            pairs = np.unique(left[meet] << 32 | right[meet])
            self.edges.append(np.stack([pairs >> 32, pairs & 0xFFFFFFFF]))

    def couple_along(self, x: Tensor, axis: int) -> None:
        self.couple(x, x.amax(axis, keepdim=True))

    def block(self, value: Any, reason: str) -> None:
        found = [np.unique(x.numpy()) for x in tensors_in(value)]
        labels = np.concatenate([x[x > NOTHING] for x in found]) if found else np.empty(0, np.int64)
        if len(labels):
            self.blocked.append((labels, reason))

    def roots(self) -> np.ndarray:
        """For each label, the smallest one of its connected component."""
        root = np.arange(self.count)
        left, right = np.concatenate(self.edges, axis=1) if self.edges else np.empty((2, 0), np.int64)
        while True:
            low = np.minimum(root[left], root[right])
            after = root.copy()
            np.minimum.at(after, root[left], low)
            np.minimum.at(after, root[right], low)
            while (after != after[after]).any():
                after = after[after]
            if (after == root).all():
                return root
            root = after


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def blank(shape: Any) -> Any:
    """Unlabelled tensors of a node's recorded shape or shapes; None where none was recorded."""
    if shape is None:
        return None
    if all(isinstance(n, int) for n in shape):
        return torch.zeros(tuple(shape), dtype=torch.int64)
    return tuple(blank(s) for s in shape)


def name_of(node: fx.Node) -> str:
    """What a node calls, as its writer would say it: `view`, `add`, `attention`."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def label(graph: fx.Graph, root: nn.Module, stream: str | None) -> Labelling:
    """Run the graph of the unit `root` on labels; `stream` names the placeholder of the residual stream, if any."""
    out = Labelling()
    for node in graph.nodes:
        if node.op == "output":
            found = [x.numpy().ravel() for x in tensors_in(fx.map_arg(node.args, out.values.__getitem__))]
            out.output = np.unique(np.concatenate(found)) if found else out.output
            continue
        step = _Step(out, root, node)
        try:
            out.values[node] = step.value(stream)
        except _MISFITS:
            # The arguments have another form than the rule for this name expects: it is some other function.
            out.values[node] = step.unknown(f"`{name_of(node)}`")
    return out


class _Step:
    """One node of a run: its arguments as labels, and the rules."""

    def __init__(self, out: Labelling, root: nn.Module, node: fx.Node):
        self.out, self.root, self.node = out, root, node
        self.args = fx.map_arg(node.args, out.values.__getitem__)
        self.kwargs = fx.map_arg(node.kwargs, out.values.__getitem__)

    def value(self, stream: str) -> Any:
        node = self.node
        if node.op == "placeholder":
            found = blank(node.meta.get("shape"))
            return found.fill_(STREAM) if node.name == stream else found
        if node.op == "get_attr":
            return self.attribute()
        if node.op == "call_module":
            return self.module(self.root.get_submodule(node.target))
        return self.function(name_of(node))

    def attribute(self) -> Any:
        """A vector read directly has labels of its own; what meets any other parameter is blocked."""
        found = self.root
        for name in self.node.target.split("."):
            found = getattr(found, name)
        if not isinstance(found, Tensor):
            return self.node
        if not isinstance(found, nn.Parameter):
            return blank(found.shape)
        if found.ndim == 1:
            return self.claim("", 0, self.out.fresh(len(found)))
        labels = self.out.fresh(1)
        self.out.block(labels, f"the parameter {self.node.target} is read outside of a module")
        return labels.expand(found.shape)

    def function(self, name: str) -> Any:
        rule = _LEAVES.get(name) or _LEAVES.get(self.node.meta.get("role"))
        if rule is not None:
            return rule(self)
        labelled = list(tensors_in((self.args, self.kwargs)))
        if name in MOVES or (not labelled and _is_plain(self.node)):
            return self.execute()
        if name in POINTWISE:
            return self.pointwise(labelled)
        if name in MIXES | REDUCES and labelled:
            return self.mix(name, labelled[0])
        if name in PRODUCTS and all(x.ndim > 1 for x in labelled):
            return self.product(labelled)
        return self.unknown(f"`{name}`")

    def execute(self) -> Any:
        target = self.node.target
        if self.node.op == "call_method":
            return getattr(self.args[0], target)(*self.args[1:], **self.kwargs)
        if target is getattr and self.args[1] == "dtype":
            return self.node.meta.get("dtype")
        return target(*self.args, **self.kwargs)

    def pointwise(self, inputs: list[Tensor]) -> Any:
        if not inputs:
            return blank(self.node.meta.get("shape"))
        found = inputs[0]
        for other in inputs[1:]:
            self.out.couple(found, other)
            found, other = torch.broadcast_tensors(found, other)
            found = torch.where(found == NOTHING, other, found)
        return found

    def mix(self, name: str, x: Tensor) -> Any:
        if "softmax" in name:
            self.out.weighed.append(np.unique(x.numpy()))
        axes = self.mixed_axes(name, x)
        for axis in axes:
            self.out.couple_along(x, axis)
        if name in MIXES:
            return x
        keep = self.kwargs.get("keepdim", self.args[2] if len(self.args) > 2 else False) is True
        return x.amax(axes, keepdim=keep)

    def mixed_axes(self, name: str, x: Tensor) -> tuple[int, ...]:
        sizes = "normalized_shape" if name in ("layer_norm", "rms_norm") else "dim"
        given = self.args[1] if len(self.args) > 1 else self.kwargs.get(sizes)
        if given is None:
            return tuple(range(x.ndim))
        if sizes == "normalized_shape":
            return tuple(range(-len(given), 0))
        return (given,) if isinstance(given, int) else tuple(given)

    def module(self, module: nn.Module) -> Any:
        x = next(tensors_in((self.args, self.kwargs)), None)
        kind = type(module).__name__
        runs = type(module).forward                   # a subclass with another forward is something else
        if runs is nn.Linear.forward:
            return self.contract(x, module, out_axis=0)
        if runs is Conv1D.forward:
            return self.contract(x, module, out_axis=1)
        if runs in _CONVOLUTIONS:
            return self.convolve(x, module)
        if isinstance(module, _MOVING):
            return module(x)
        if runs in _POOLS:
            return self.pool(x)
        if isinstance(module, (_NormBase, nn.GroupNorm)):
            return self.channel_norm(x, module)
        if "Norm" in kind:
            return self.norm(x, module)
        if runs is nn.Embedding.forward:
            rows = self.claim("weight", 1, self.out.fresh(module.embedding_dim))
            return rows.expand(*x.shape, -1)
        if not any(True for _ in module.parameters()) and _is_pointwise(module):
            return x
        if next(module.parameters(), None) is not None:
            self.out.refused.append((self.node.target, f"a {kind} is taken as a whole"))
        return self.unknown(f"{kind} {self.node.target}")

    def claim(self, name: str, axis: int, labels: Tensor, reads: bool = False) -> Tensor:
        """Note a claim; one tensor used twice has the same rows both times."""
        tensor = f"{self.node.target}.{name}" if name else self.node.target
        for known in self.out.claims:
            if (known.tensor, known.axis) == (tensor, axis):
                self.out.couple(torch.from_numpy(known.labels), labels)
                return labels
        self.out.claims.append(Claim(tensor, axis, labels.numpy(), reads))
        return labels

    def contract(self, x: Tensor, module: nn.Module, out_axis: int) -> Tensor:
        """A matrix product: reads its input's labels at its columns and gives its rows new ones."""
        flat = x.reshape(-1, x.shape[-1])
        self.out.couple_along(flat, 0)
        self.claim("weight", 1 - out_axis, flat.amax(0), reads=True)
        rows = self.claim("weight", out_axis, self.out.fresh(module.weight.shape[out_axis]))
        if module.bias is not None:
            self.claim("bias", 0, rows)
        return rows.expand(*x.shape[:-1], -1)

    def convolve(self, x: Tensor, module: nn.Module) -> Tensor:
        """[b, c, ...] -> [b, rows, ...]: as `contract`, but each group of rows reads its own group of channels."""
        channels = self.channels_of(x)
        groups, weight = module.groups, module.weight
        rows = self.out.fresh(len(weight))
        if groups == 1:
            self.claim("weight", 1, channels, reads=True)
        else:
            # A group goes as a whole: the width of one is a number that all of them share.
            inputs, outputs = channels.view(groups, -1), rows.view(groups, -1)
            self.out.couple(inputs, inputs.amax(1, keepdim=True))
            self.out.couple(outputs, inputs.amax(1, keepdim=True))
        self.claim("weight", 0, rows)
        if module.bias is not None:
            self.claim("bias", 0, rows)
        return self.spread(rows)

    def channels_of(self, x: Tensor) -> Tensor:
        """One label per channel of [b, c, ...], coupled over all places."""
        by_channel = x.movedim(1, 0).flatten(1)
        self.out.couple_along(by_channel, 1)
        return by_channel.amax(1)

    def spread(self, channels: Tensor) -> Tensor:
        """Labels of channels in the shape of this node's result."""
        shape = self.node.meta["shape"]
        return channels.view(-1, *(1 for _ in shape[2:])).expand(shape)

    def pool(self, x: Tensor) -> Tensor:
        """Places of a channel are drawn together, channels stay apart."""
        return self.spread(self.channels_of(x))

    def channel_norm(self, x: Tensor, module: nn.Module) -> Tensor:
        """Statistics of each channel of [b, c, ...], or of a group of them; running ones follow the weight."""
        channels = self.channels_of(x)
        if module.weight is not None:
            self.claim("weight", 0, channels)
            self.claim("bias", 0, channels)
        elif getattr(module, "running_mean", None) is not None:
            self.out.block(channels, f"{self.node.target} keeps statistics of them and has no weight")
        if isinstance(module, nn.GroupNorm):
            groups = channels.view(module.num_groups, -1)
            self.out.couple(groups, groups.amax(1, keepdim=True))
        return self.spread(channels)

    def norm(self, x: Tensor, module: nn.Module) -> Tensor:
        """A norm's statistics run over the axes of its weight: what shares them can't be parted."""
        weight = next(module.parameters(), None)
        for axis in range(1, 1 + (weight.ndim if weight is not None else 1)):
            self.out.couple_along(x, -axis)
        return x

    def unknown(self, what: str) -> Any:
        """No rule: what goes in can't be narrowed, nor what its result meets."""
        reason = f"{what} does something unknown with its channels"
        result = blank(self.node.meta.get("shape"))
        if any((x > NOTHING).any() for x in tensors_in((self.args, self.kwargs))):
            self.out.block((self.args, self.kwargs), reason)
            mark = self.out.fresh(1)
            self.out.block(mark, reason)
            for x in tensors_in(result):
                x.fill_(int(mark))
        return result

    def product(self, inputs: list[Tensor]) -> Tensor:
        """[..., n, k] @ [..., k, m]: the contracted channels belong together, and so do those they meet."""
        *added, left, right = inputs
        self.out.couple_along(left, -1)
        self.out.couple_along(right, -2)
        return self.pointwise([right.amax(-2, keepdim=True), left.amax(-1, keepdim=True), *added])

    def rotary(self) -> Any:
        """q, k or both, turned: the channels of a head mix. Angles have no labels."""
        turned = tuple(x for x in tensors_in(self.args) if (x > STREAM).any())
        for x in turned:
            self.out.couple_along(x, -1)
        if not isinstance(self.node.meta["dtype"], tuple):
            return turned[0]
        if len(turned) != len(self.node.meta["dtype"]):
            return self.unknown(f"`{name_of(self.node)}`")
        return turned

    def cache_update(self) -> tuple[Tensor, Tensor]:
        return self.args[1], self.args[2]

    def attention(self) -> tuple[Tensor, None]:
        """q [b, h, t, d], k and v [b, kv, s, d] -> [b, t, h, d]: heads stay apart, what is in one doesn't."""
        module, q, k, v = self.args[:4]
        path = module.target if isinstance(module, fx.Node) else ""
        heads = self.attend(path, q, k, v)
        b, _, t, _ = q.shape
        return heads[None, None, :, None].expand(b, t, -1, v.shape[-1]), None

    def fused_attention(self) -> Tensor:
        """torch's own, in the layout [b, h, t, d]."""
        q, k, v = self.args[:3]
        scope = self.node.meta.get("scope") or ("",)
        heads = self.attend(scope[-1], q, k, v)
        return heads[None, :, None, None].expand(*q.shape[:-1], v.shape[-1])

    def attend(self, module: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Note an attention call; returns a label per query head."""
        heads = [x.permute(1, 0, 2, 3).flatten(1) for x in (q, k, v)]      # [h, everything else]
        for x in heads:
            self.out.couple_along(x, 1)
        q_heads, k_heads, v_heads = (x.amax(1) for x in heads)
        self.out.couple(k_heads, v_heads)
        if len(q_heads) == len(k_heads):
            self.out.couple(q_heads, k_heads)
        self.out.attentions.append(Attention(self.node, module, q_heads.numpy(), k_heads.numpy()))
        for name, other in self.kwargs.items():
            self.hear(name, other, q_heads)
        return q_heads

    def hear(self, name: str, other: Any, heads: Tensor) -> None:
        """What else attention is given: sinks [h] and biases [1, h, t, s] belong to their heads."""
        for x in tensors_in(other):
            if x.ndim == 1 and len(x) == len(heads):
                self.out.couple(x, heads)
            elif x.ndim == 4 and x.shape[1] == len(heads):
                self.out.couple(x, heads[None, :, None, None])
            elif (x > STREAM).any():
                self.out.block((x, heads), f"attention is given `{name}`, whose heads are not known")


_CONVOLUTIONS = frozenset(kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d))
_MOVING = (nn.Flatten, nn.Unflatten, nn.ConstantPad1d, nn.ConstantPad2d, nn.PixelShuffle, nn.PixelUnshuffle)
_POOLS = frozenset(kind.forward for kind in (
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d, nn.Upsample))
_POOLINGS = ("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
             "interpolate")
_LEAVES = {"attention": _Step.attention, "cache_update": _Step.cache_update, "rotary": _Step.rotary,
           "scaled_dot_product_attention": _Step.fused_attention,
           **dict.fromkeys(_POOLINGS, lambda step: step.pool(step.args[0]))}


def _is_plain(node: fx.Node) -> bool:
    """Whether the node computes with sizes and Python values only."""
    return node.op == "call_function" and node.target.__module__ in ("_operator", "builtins", "math")


def _is_pointwise(module: nn.Module) -> bool:
    home = type(module).__module__
    mixing = isinstance(module, (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.GLU))
    return not mixing and (isinstance(module, nn.Identity) or home.startswith(
        ("torch.nn.modules.activation", "torch.nn.modules.dropout", "transformers.activations")))

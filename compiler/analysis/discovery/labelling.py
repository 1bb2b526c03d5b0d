"""Labels: numbers that say which channel of which tensor a number of an activation comes from.

labels.py runs a graph on them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

NO_LABEL = 0  # masks, angles, constants: they constrain nobody
STREAM = 1  # the residual stream that enters the unit
FIRST = 2

MOVES = frozenset(
    """
    view reshape view_as reshape_as transpose swapaxes permute movedim contiguous clone detach split
    chunk tensor_split getitem cat concat concatenate stack unsqueeze squeeze expand expand_as flatten
    unflatten unbind narrow select repeat repeat_interleave flip roll t T mT getattr size dim numel
    split_with_sizes index_select pad broadcast_to copy_ setitem
    """.split()
)
POINTWISE = frozenset(
    """
    to float half bfloat16 double type type_as relu gelu silu mish sigmoid tanh exp log neg rsqrt sqrt
    square pow abs clamp clip sin cos softplus relu6 leaky_relu elu hardswish hardtanh logsigmoid erf
    multiply subtract divide negative float_power dropout add sub mul truediv div iadd isub imul
    itruediv add_ sub_ mul_ div_ true_divide maximum minimum where masked_fill masked_fill_ lerp addcmul
    zeros_like ones_like rsub
    """.split()
)
EXTREMES = frozenset(("max", "min"))  # of two tensors, or along an axis
NEW_TENSOR_METHODS = frozenset(("new_empty", "new_zeros", "new_ones", "new_full"))  # like their tensor in type alone
MIXES = frozenset(("softmax", "log_softmax", "layer_norm", "rms_norm", "normalize", "cumsum"))
PRODUCTS = frozenset(("matmul", "bmm", "baddbmm"))
REDUCES = frozenset(("mean", "sum", "var", "std", "amax", "amin", "logsumexp", "norm"))


@dataclass(frozen=True)
class AxisLabels:
    """The labels along one axis of a parameter: its rows where it writes, its columns where it reads."""

    tensor: str  # below the unit: "mlp.gate_proj.weight"
    axis: int
    labels: np.ndarray
    reads: bool  # whether these are the columns of a contraction


@dataclass(frozen=True)
class Weight:
    """A parameter that is read outside of a module.

    tensor  path below the unit
    rows    the label of each index of each of its axes
    axes    the same in the shape that the parameter was moved to, once for each of its axes
    """

    tensor: str
    rows: tuple[Tensor, ...]
    axes: tuple[Tensor, ...]

    def with_axes(self, axes: Sequence[Tensor]) -> "Weight":
        return replace(self, axes=tuple(axes))


@dataclass(frozen=True)
class Attention:
    """One attention call: a label of each query head and of each KV head."""

    node: fx.Node
    module: str  # below the unit
    q: np.ndarray
    kv: np.ndarray


@dataclass
class Labelling:
    """Labels of one unit, filled by a run over its graph. `values` holds the labels of every node.

    norms_couple  whether channels under one norm live and die together; not where the norm is narrowed with them, as in
                  a whole model's graph, where numbers of the whole layer (a factor, a gate of one row) tie none either
    inner_graphs  graphs of modules that are one node of the graph, by path below the unit
    """

    claims: list[AxisLabels] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    weighed: list[np.ndarray] = field(default_factory=list)  # labels under a softmax: attention written out
    rejected: list[tuple[str, str]] = field(default_factory=list)  # (module, why nothing is known of it)
    blocked: list[tuple[np.ndarray, str]] = field(default_factory=list)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    count: int = FIRST
    edges: list[np.ndarray] = field(default_factory=list)  # each [2, n]: labels that belong together
    chosen: list[tuple[np.ndarray, int]] = field(default_factory=list)  # labels of which values pick some, of how many
    output: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # labels of what is returned
    norms_couple: bool = True
    inner_graphs: Mapping[str, fx.Graph] = field(default_factory=dict)

    def new_labels(self, size: int) -> Tensor:
        self.count += size
        return torch.arange(self.count - size, self.count, dtype=torch.int64)

    def claim_axis(self, tensor: str, axis: int, labels: Tensor, is_read: bool = False) -> Tensor:
        """Note a claim; one tensor used twice has the same rows both times."""
        for known in self.claims:
            if (known.tensor, known.axis) == (tensor, axis):
                self.couple(torch.from_numpy(known.labels), labels)
                return labels
        self.claims.append(AxisLabels(tensor, axis, labels.numpy(), is_read))
        return labels

    def couple(self, labels: Tensor, other_labels: Tensor) -> None:
        """Labels at the same place, after broadcasting, belong together."""
        labels, other_labels = (x.reshape(-1).numpy() for x in torch.broadcast_tensors(labels, other_labels))
        meet = (labels != other_labels) & (labels > NO_LABEL) & (other_labels > NO_LABEL)
        if meet.any():
            pairs = np.unique(labels[meet] << 32 | other_labels[meet])
            self.edges.append(np.stack([pairs >> 32, pairs & 0xFFFFFFFF]))

    def couple_along(self, x: Tensor, axis: int) -> None:
        self.couple(x, x.amax(axis, keepdim=True))

    def block_pruning_of(self, value: Any, reason: str) -> None:
        label_sets = [np.unique(x.numpy()) for x in tensors_in(value)]
        labels = np.concatenate([x[x > NO_LABEL] for x in label_sets]) if label_sets else np.empty(0, np.int64)
        if len(labels):
            self.blocked.append((labels, reason))

    def component_roots(self) -> np.ndarray:
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


def unlabelled_like(shape: Any) -> Any:
    """Unlabelled tensors of a node's recorded shape or shapes; None where none was recorded."""
    if shape is None:
        return None
    if all(isinstance(n, int) for n in shape):
        return torch.zeros(tuple(shape), dtype=torch.int64)
    return tuple(unlabelled_like(s) for s in shape)

"""Attention that a model writes out in products and a softmax, recognised by what all of it together computes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import attention_lowering, attentions, calls, graph_values
from .attentions import Attention
from .plan_builder import PlanBuilder
from .positional import Positions
from .rule import NodeCall
from .values import CachedRows, Rows, ScorePairs

PRODUCTS = frozenset({"matmul", "bmm"})
SDPA = "scaled_dot_product_attention"
_REASON = "attention that the engine does not have: its scale, slopes, window or mask is none of the known"


@dataclass(frozen=True)
class Leaf:
    """Queries, keys or values as they enter, for one row of `length` tokens.

    shape   of the value; `axis` that of its tokens
    """

    node: fx.Node
    shape: tuple[int, ...]
    axis: int

    @property
    def sizes(self) -> tuple[int, int]:
        """Heads, and numbers of each."""
        other_sizes = [size for axis, size in enumerate(self.shape) if axis != self.axis]
        return torch.Size(other_sizes[:-1]).numel(), other_sizes[-1]

    def in_layout_of_value(self, x: Tensor) -> Tensor:
        """[length, heads, d] as the value has it."""
        sizes = [size for axis, size in enumerate(self.shape) if axis != self.axis]
        return x.reshape(len(x), *sizes).movedim(0, self.axis)


def _second_operand(node: fx.Node) -> fx.Node:
    assert isinstance(node.args[1], fx.Node), f"{node.name} multiplies by no value"
    return node.args[1]


def is_score_product(builder: PlanBuilder, call: NodeCall) -> bool:
    """Whether a product has numbers of two tokens in each of its own, as scores of an attention without a cache."""
    if call.module is not None or call.name not in PRODUCTS or not all(isinstance(x, Rows) for x in call.args):
        return False
    a, b = call.args
    if a.index.dim() != b.index.dim() or a.index.shape[-2] != b.index.shape[-1]:
        return False
    _, token = builder.plan.layout.registers_and_tokens(b.index.reshape(-1, b.index.shape[-1]))
    return not torch.equal(token, token[:, :1].expand_as(token))


def lower_score_product(builder: PlanBuilder, call: NodeCall) -> ScorePairs:
    """Scores of queries and keys; the cache keeps those keys, whether the model itself has one or not."""
    _mark_as_cached_rows(builder, _second_operand(call.node))
    return ScorePairs(call.node)


def mixes_tokens(builder: PlanBuilder, call: NodeCall) -> bool:
    """Whether a call combines a token with all tokens before it."""
    return ScorePairs in call.kinds or {Rows, CachedRows} <= call.kinds


def _mark_as_cached_rows(builder: PlanBuilder, node: fx.Node) -> None:
    value = builder.values[node]
    builder.values[node] = CachedRows(value) if isinstance(value, Rows) else value


def lower_score_operation(builder: PlanBuilder, call: NodeCall) -> Any:
    """Scores on their way to weights, or the attention that spends them."""
    node, args, name, inputs = call.node, call.args, call.name, call.node.all_input_nodes
    if name in PRODUCTS and isinstance(args[0], ScorePairs) and isinstance(args[1], Rows):
        _mark_as_cached_rows(builder, _second_operand(node))
    operands = [builder.values[used] for used in inputs]
    if name in calls.SIZE_CALLS:
        return graph_values.lower_size_of_sample(builder, call)
    spends = any(isinstance(x, ScorePairs) for x in operands) and any(isinstance(x, CachedRows) for x in operands)
    if name == SDPA or (name in PRODUCTS and spends):
        return _lower_attention(builder, node, name)
    return ScorePairs(node)


def _lower_attention(builder: PlanBuilder, node: fx.Node, name: str) -> Rows:
    leaves = _qkv_nodes(builder, node, name)
    if leaves is None:
        raise builder.rejection(node, "attention to something else than keys and values of all tokens")
    module = _module(builder, node)
    q, k, v = leaves
    heads, head_dim = _leaf(builder, q, 1).sizes
    (kv_heads, key_dim), (value_heads, value_dim) = _leaf(builder, k, 1).sizes, _leaf(builder, v, 1).sizes
    form = None
    if key_dim == head_dim and kv_heads == value_heads and heads % kv_heads == 0:
        form = _recognise_attention(builder, node, module, leaves)
    if form is None:
        raise builder.rejection(node, _REASON)
    sizes = attentions.HeadSizes(heads, kv_heads, head_dim, value_dim)
    qkv = [_rows_of_node(builder, x) for x in leaves]
    register = attention_lowering.append_attention_and_cache_slot(builder, node, form, qkv, sizes)
    return Rows(_register_as_sample_value(builder, node, register, heads, value_dim))


def _rows_of_node(builder: PlanBuilder, node: fx.Node) -> Rows:
    value = builder.values[node]
    return value.rows if isinstance(value, CachedRows) else value


def _module(builder: PlanBuilder, node: fx.Node) -> nn.Module:
    scope = node.meta.get("scope", ())
    return builder.model.get_submodule(scope[-1] if scope else "")


def _qkv_nodes(builder: PlanBuilder, node: fx.Node, name: str) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The nodes of queries, keys and values."""
    if name == SDPA:
        q, k, v = (*node.args, *node.kwargs.values())[:3]
        if not (isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)):
            return None
        kinds = [type(builder.values[x]) for x in (q, k, v)]
        return (q, k, v) if kinds == [Rows, CachedRows, CachedRows] else None
    values = [x for x in node.all_input_nodes if isinstance(builder.values[x], CachedRows)]
    visited, queue = {node}, [x for x in node.all_input_nodes if isinstance(builder.values[x], ScorePairs)]
    queries, keys = [], []
    while queue:
        product = queue.pop()
        for used in product.all_input_nodes:
            if used in visited:
                continue
            visited.add(used)
            value = builder.values[used]
            if isinstance(value, ScorePairs):
                queue.append(used)
            elif isinstance(value, Rows):
                queries.append(used)
            elif isinstance(value, CachedRows):
                keys.append(used)
    is_unique = len(queries) == len(keys) == len(values) == 1
    return (queries[0], keys[0], values[0]) if is_unique else None


# -- trials ----------------------------------------------------------------------------------------------


def _leaf(builder: PlanBuilder, node: fx.Node, length: int) -> Leaf:
    shape, axis = builder.positions.shape_for_length(_rows_of_node(builder, node).index, length)
    return Leaf(node, shape, axis)


@torch.no_grad()
def _recognise_attention(
    builder: PlanBuilder, node: fx.Node, module: nn.Module, qkv_nodes: tuple[fx.Node, ...]
) -> Attention | None:
    windows = attentions.candidate_windows(module, {})
    try:
        context = builder.plan.context
        lengths = [min(length, context) for length in attentions.trial_lengths([w for w in windows if w < context])]
        known = [row for length in lengths for row in _trial_attention_outputs(builder, node, qkv_nodes, length)]
        slopes = _probe_alibi_slopes(builder, node, qkv_nodes)
    except (RuntimeError, TypeError, ValueError, IndexError):  # made for something else than one row
        return None
    head_dim = _leaf(builder, qkv_nodes[0], 1).sizes[1]
    for form in _candidate_attentions(module, head_dim, windows, slopes):
        if all(torch.allclose(form(q, k, v, at), out, atol=2e-5, rtol=2e-5) for q, k, v, at, out in known):
            return form
    return None


def _trial_attention_outputs(
    builder: PlanBuilder, node: fx.Node, leaves: tuple[fx.Node, ...], length: int
) -> list[tuple[Any, ...]]:
    """Run attention on random q, keys and values [heads, length, d]; inputs and results at a few positions."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn((length, *_leaf(builder, x, length).sizes), generator=generator) for x in leaves)
    out = _evaluate_attention(builder, node, leaves, (q, k, v))
    positions = dict.fromkeys((0, length // 2, length - 1))
    return [(q[at], k.transpose(0, 1), v.transpose(0, 1), at, out[at]) for at in positions]


def _probe_alibi_slopes(builder: PlanBuilder, node: fx.Node, leaves: tuple[fx.Node, ...]) -> Tensor | None:
    """Slope of the scores per token of distance, by head, from queries of zeros and distinct values."""
    (heads, d), (kv_heads, key_dim), (_, wide) = (_leaf(builder, x, 1).sizes for x in leaves)
    length = min(wide, attentions.SHORT)
    if length < 2:
        return None
    v = torch.eye(length, wide)[:, None].expand(length, kv_heads, wide)
    shares = _evaluate_attention(
        builder, node, leaves, (torch.zeros(length, heads, d), torch.zeros(length, kv_heads, key_dim), v)
    )[-1]
    slopes = (shares[:, length - 1] / shares[:, length - 2]).log()
    return slopes if bool(slopes.isfinite().all()) and float(slopes.abs().max()) > 1e-6 else None


def _evaluate_attention(
    builder: PlanBuilder, node: fx.Node, leaf_nodes: tuple[fx.Node, ...], qkv: tuple[Tensor, ...]
) -> Tensor:
    """[length, heads, d] of the program, of these queries, keys and values [length, heads, d]."""
    length = len(qkv[0])
    leaves = {x: _leaf(builder, x, length).in_layout_of_value(value) for x, value in zip(leaf_nodes, qkv, strict=True)}
    out = _Trial(builder, leaves).at(node, length).float()
    heads, wide = qkv[0].shape[1], qkv[2].shape[2]
    out = out if out.dim() == 4 else out[None]
    return out[0].transpose(0, 1) if out.shape == (1, heads, length, wide) else out.view(length, heads, wide)


def _register_as_sample_value(
    builder: PlanBuilder, node: fx.Node, register: int, heads: int, head_width: int
) -> Tensor:
    """Element numbers of a register in the shape of the sample's result."""
    batch, length = builder.shape
    shape = node.meta["shape"]
    rows = builder.rows(register).view(batch, length, heads, head_width)
    if tuple(shape) in ((batch, heads, length, head_width), (batch * heads, length, head_width)):
        rows = rows.transpose(1, 2)
    return rows.reshape(shape)


class _Trial(Positions):
    """Runs a part of a graph on given numbers; what else tokens have there is zero."""

    def __init__(self, builder: PlanBuilder, leaves: dict[fx.Node, Tensor]):
        super().__init__(builder.model, builder.values, builder.plan.layout, builder.shape)
        self.builder, self.leaves = builder, leaves

    def _evaluate_at_length(self, node: fx.Node, length: int) -> Any:
        if node in self.leaves:
            return self.leaves[node]
        value = self.builder.values.get(node)
        rows = value.rows if isinstance(value, CachedRows) else value
        if isinstance(rows, Rows) and not self.builder.ids.are(rows.index):
            return torch.zeros(self.shape_for_length(rows.index, length)[0])
        return super()._evaluate_at_length(node, length)


def _candidate_attentions(
    module: nn.Module, head_dim: int, windows: list[int], slopes: Tensor | None
) -> Iterator[Attention]:
    floats = [value for value in vars(module).values() if isinstance(value, float)]
    for scale in dict.fromkeys((1.0, head_dim**-0.5, *floats)):
        for window in (None, *windows):
            yield Attention(scale, window=window, slopes=slopes)
            if slopes is None:
                yield Attention(scale, window=window, bidirectional=True)

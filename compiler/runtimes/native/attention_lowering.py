"""Attention layers: what they cache and what they attend to."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from . import attentions, distances, key_score_bias
from .plan_builder import PlanBuilder
from .rule import NodeCall
from .values import CachedRows, KeyScoreBias, Positional, Rows, SourceTokens


def lower_cache_update(builder: PlanBuilder, call: NodeCall) -> tuple[CachedRows, CachedRows]:
    """Keys and values of all tokens that attention reads from the cache."""
    _, k, v, _ = call.args
    if not (isinstance(k, Rows) and isinstance(v, Rows) and k.index.dim() == v.index.dim() == 4):
        reason = "keys and values of another form than [batch, heads, tokens, width]"
        raise builder.rejection(call.node, reason)
    return CachedRows(k), CachedRows(v)


def lower_attention(builder: PlanBuilder, call: NodeCall) -> tuple[Rows, None]:
    node, kwargs, (module, q, k, v, mask) = call.node, call.kwargs, call.args
    recalls = isinstance(k, SourceTokens) and isinstance(v, SourceTokens)
    k, v = (x.rows if isinstance(x, CachedRows) or recalls else x for x in (k, v))  # encoders cache none
    if not all(isinstance(x, Rows) for x in (q, k, v)):
        raise builder.rejection(node, "attention to something else than what the layer caches")
    key_bias = mask if isinstance(mask, KeyScoreBias) else None
    if mask is not None and key_bias is None and not isinstance(mask, Positional):
        raise builder.rejection(node, "attention under a mask that tokens decide")
    gaining = [name for name, value in kwargs.items() if _is_score_bias(builder, node, name, value)]
    of_tokens = (Positional, Rows, CachedRows)
    options = {key: value for key, value in kwargs.items() if not isinstance(value, of_tokens) and key not in gaining}
    (_, heads, _, head_dim), value_dim = q.index.shape, v.index.shape[3]
    kv_heads = k.index.shape[1]
    sizes = attentions.HeadSizes(heads, kv_heads, head_dim, value_dim)
    mask_fn = (
        _mask_of_length(builder, mask)
        if key_bias is None
        else key_score_bias.mask_function_of_length(builder, key_bias)
    )
    try:
        gains = partial(_probe_score_bias, builder, node, module, heads, *gaining[:1])
        form = (
            heads % kv_heads == 0
            and len(gaining) < 2
            and attentions.recognise_attention(module, mask_fn, sizes, options, gains)
        )
    except RuntimeError:  # it is handed tables that were made for the sample's length
        form = None
    if not form:
        raise builder.rejection(
            node, "attention that the engine does not have: its scale, cap, window or mask is none of the known"
        )
    if key_bias is not None:
        q, k = key_score_bias.append_bias_column(builder, node, module, form, key_bias, q, k)
        sizes = sizes._replace(head_dim=head_dim + 1)
    by_head = any(x is not None for x in (form.slopes, form.sinks, form.distances))
    kv_order, order = (None, None) if by_head else _distinct_kv_heads_and_query_order(k.index, v.index, heads)
    if kv_order is not None and order is not None:
        q, k, v = Rows(q.index[:, order], q.pending), *(Rows(x.index[:, kv_order], x.pending) for x in (k, v))
        sizes = sizes._replace(kv_heads=len(kv_order))
    register = (append_recall_and_source_cache if recalls else append_attention_and_cache_slot)(
        builder, node, form, [q, k, v], sizes
    )
    batch, length = builder.shape
    rows = builder.rows(register).view(batch, length, heads, value_dim)
    return Rows(rows if order is None else rows[:, :, order.argsort()]), None


def append_attention_and_cache_slot(
    builder: PlanBuilder, node: fx.Node, form: attentions.Attention, qkv: list[Rows], head_sizes: attentions.HeadSizes
) -> int:
    """The register of attention of queries to keys and values, which the cache's next slot keeps."""
    plan, (heads, kv_heads, head_dim, value_dim) = builder.plan, head_sizes
    slopes = None if form.slopes is None else plan.add_vector(f"{node.name}.slopes", form.slopes)
    sinks = None if form.sinks is None else plan.add_vector(f"{node.name}.sinks", form.sinks)
    distance_table = None if form.distances is None else plan.add_vector(f"{node.name}.distances", form.distances)
    registers = {name: builder.register(x)[0] for name, x in zip("qkv", qkv, strict=True)}
    window = form.window if form.window is not None and form.window < plan.context else None
    slot = plan.append_cache_slot(kv_heads, head_dim, value_dim)
    counts = {"slot": slot, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim}
    scores: dict[str, Any] = {"scale": form.scale, "softcap": form.softcap, "window": window, "sinks": sinks}
    scores |= {} if slopes is None else {"slopes": slopes}
    scores |= {"whole": True} if form.bidirectional else {}
    scores |= {} if distance_table is None else {"distances": distance_table}
    return plan.append_step("attention", heads * value_dim, **registers, **counts, **scores)


def append_recall_and_source_cache(
    builder: PlanBuilder, node: fx.Node, form: attentions.Attention, qkv: list[Rows], head_sizes: attentions.HeadSizes
) -> int:
    """The register of attention of queries to a source, whose keys and values its encoder remembers."""
    heads, kv_heads, head_dim, value_dim = head_sizes
    unsupported = (form.window, form.sinks, form.slopes, form.distances)
    if not form.bidirectional or any(part is not None for part in unsupported):
        raise builder.rejection(node, "attention to a source by positions, which the engine has not")
    source = builder.source
    assert source is not None, "only behind an encoder there is a source"
    k, v = (source.register(x)[0] for x in qkv[1:])
    q, slot = builder.register(qkv[0])[0], source.plan.append_source_cache(k, v, kv_heads, head_dim, value_dim)
    counts = {"slot": slot, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim}
    return builder.plan.append_step("recall", heads * value_dim, q=q, **counts, scale=form.scale, softcap=form.softcap)


def _is_score_bias(builder: PlanBuilder, node: fx.Node, option: str, value: Any) -> bool:
    """Whether an option is what scores gain: a number for each pair of tokens of a row, that no token decides."""
    at = node.kwargs[option]
    if not isinstance(at, fx.Node) or not isinstance(value, (Tensor, Positional)):
        return False
    try:
        return distances.is_bias_of_one_row(builder.positions.at(at, 3), 3)
    except (RuntimeError, TypeError, ValueError, IndexError):  # made for something else than one row
        return False


def _probe_score_bias(
    builder: PlanBuilder,
    node: fx.Node,
    module: torch.nn.Module,
    heads: int,
    name: str = "",
    *,
    bidirectional: bool = False,
) -> attentions.ScoreBias | None:
    """Bias that an option adds to scores; it may shorten the context. RuntimeError where more than distance
    counts."""
    if not name:
        return None
    source, plan = node.kwargs[name], builder.plan
    assert isinstance(source, fx.Node), f"`{name}` of {node.name} is no value"  # see `_is_score_bias`
    at = partial(builder.positions.at, source)

    def distance_table() -> Tensor | None:
        config = getattr(module, "config", builder.model.config)
        table = distances.bias_by_distance_and_max_length(at, heads, bidirectional, config, plan.context)
        plan.context = plan.context if table is None else min(plan.context, table[1])
        return None if table is None else table[0]

    known = builder.remember(("distances", source, bidirectional), distance_table)
    if known is None:
        raise RuntimeError("scores gain by more than distance")
    return attentions.ScoreBias(name, at, known)


def _mask_of_length(builder: PlanBuilder, mask: Positional | None) -> Any:
    if mask is None:
        return lambda length: None
    return lambda length: builder.positions.at(mask.node, length)


def _distinct_kv_heads_and_query_order(k: Tensor, v: Tensor, heads: int) -> tuple[Tensor | None, Tensor | None]:
    """Find keys and values [b, heads, t, d] that are copies of heads: those that differ, and the order of queries by
    them."""
    first = torch.unique(torch.stack([k[0, :, 0, 0], v[0, :, 0, 0]]), dim=1, return_inverse=True)[1]
    numbers = [(first == first[i]).nonzero()[0, 0] for i in range(len(first))]
    numbers_of = torch.stack(numbers)
    distinct, counts = numbers_of.unique(return_counts=True)
    copies = all(torch.equal(x, x[:, numbers_of]) for x in (k, v))
    if len(distinct) == len(numbers_of) or not copies or len(counts.unique()) > 1:
        return None, None
    group = heads // len(numbers_of)
    return distinct, (numbers_of.argsort(stable=True)[:, None] * group + torch.arange(group)).flatten()

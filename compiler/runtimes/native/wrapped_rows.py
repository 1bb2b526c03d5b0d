"""Numbers of some tokens only, or of others: what is computed of those is lowered as for every token."""

from typing import Any

from . import calls
from .plan_builder import PlanBuilder
from .rule import NodeCall
from .trees import mapped
from .values import CachedRows, FirstTokenRows, Rows, SourceTokens


def is_of_source(builder: PlanBuilder, call: NodeCall) -> bool:
    return builder.source is not None and call.node in builder.source.values


def lower_source_value(builder: PlanBuilder, call: NodeCall) -> Any:
    """Value that the encoder's side has."""
    assert builder.source is not None, "only behind an encoder there is a source"
    return _as_source_tokens(builder.source.values[call.node])


def reads_source(builder: PlanBuilder, call: NodeCall) -> bool:
    return SourceTokens in call.kinds and call.role != "attention"


def lower_in_encoder(builder: PlanBuilder, call: NodeCall) -> Any:
    """Value computed from the source alone and sizes of the target: part of the encoder."""
    source = builder.source
    assert source is not None, "only behind an encoder there is a source"
    if not call.kinds.isdisjoint((Rows, CachedRows)):
        reason = "it mixes what the encoder gives with a target otherwise than by attention"
        raise builder.rejection(call.node, reason)
    source.current = call.node
    value = source.values[call.node] = source.lower(_unwrapped(call, SourceTokens))
    return _as_source_tokens(value)


def lower_on_first_token(builder: PlanBuilder, call: NodeCall) -> FirstTokenRows:
    """Value computed from a text's first token, computed for each."""
    reason = "it does more with a text's first token than layers and functions of it"
    if call.module is None and call.name not in (*calls.UNARY, *calls.SAME):
        raise builder.rejection(call.node, reason)
    value = builder.lower(_unwrapped(call, FirstTokenRows))
    if not isinstance(value, Rows):
        raise builder.rejection(call.node, reason)
    return FirstTokenRows(value)


def lower_cached(builder: PlanBuilder, call: NodeCall) -> Any:
    """Value of each token when it comes; what is made of it is kept."""
    value = builder.lower(_unwrapped(call, CachedRows))
    return mapped(value, lambda x: CachedRows(x) if isinstance(x, Rows) else x)


def _unwrapped(call: NodeCall, wrapper_class: type[CachedRows] | type[FirstTokenRows] | type[SourceTokens]) -> NodeCall:
    return call.mapped(lambda x: x.rows if isinstance(x, wrapper_class) else x)


def _as_source_tokens(value: Any) -> Any:
    return mapped(value, lambda x: SourceTokens(x) if isinstance(x, Rows) else x)

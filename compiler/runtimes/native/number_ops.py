"""Functions that move numbers of tokens, join them, or write some of them in place."""

from types import NotImplementedType
from typing import Any

import torch
from torch import Tensor, fx

from . import calls, elementwise, linears
from .plan_builder import PlanBuilder
from .positional import run_node
from .rule import NodeCall
from .trees import index, wrapped
from .values import FirstTokenRows, Rows, picks_first

_INPLACE_OPS = {"add_": "add", "sub_": "sub", "mul_": "mul"}
INPLACE = frozenset(_INPLACE_OPS)


def lower_size(builder: PlanBuilder, call: NodeCall) -> Any:
    return run_node(call.node, builder.model, (call.first.index, *call.args[1:]), call.kwargs)


def lower_identity(builder: PlanBuilder, call: NodeCall) -> Any:
    """First operand, which the engine takes as it is."""
    return call.first


def lower_item(builder: PlanBuilder, call: NodeCall) -> Any:
    return call.first[call.args[1]]


def lower_zeros(builder: PlanBuilder, call: NodeCall) -> Rows:
    """Nothing yet, of a shape or that of another value."""
    shape = call.args[1:]
    flat = shape[0] if shape and isinstance(shape[0], tuple | list) else shape
    return Rows(torch.full(tuple(flat) or tuple(call.first.index.shape), -1))


def lower_copy(builder: PlanBuilder, call: NodeCall) -> Rows | NotImplementedType:
    if not isinstance(call.args[1], Rows):
        return NotImplemented
    call.first.index.copy_(builder.materialised(call.args[1]).index)  # a part of what is filled piece by piece
    return call.first


def lower_inplace(builder: PlanBuilder, call: NodeCall) -> Rows:
    value: Rows = elementwise.lower_binary_operands(builder, call.node, _INPLACE_OPS[call.name], *call.args)
    _record_in_place_change(builder, call.node, value)
    return value


def lower_setitem(builder: PlanBuilder, call: NodeCall) -> NotImplementedType | None:
    """A part of a value is another from here on."""
    x, subscript, by = call.args
    if not isinstance(by, Rows):
        return NotImplemented
    updated = builder.without_pending(x).index.clone()
    updated[subscript] = builder.materialised(by).index
    _record_in_place_change(builder, call.node, Rows(updated))
    return None


def _record_in_place_change(builder: PlanBuilder, node: fx.Node, value: Rows) -> None:
    """Record an in-place change: later readers of the changed node read the new value."""
    target = node.args[0]
    assert isinstance(target, fx.Node), f"{node.name} changes no value"
    base, order = target, {other: i for i, other in enumerate(node.graph.nodes)}
    while base.args and calls.operation_name(base) in calls.MOVES | calls.SAME and isinstance(base.args[0], fx.Node):
        base = base.args[0]
        if any(order[user] > order[node] for user in base.users):
            raise builder.rejection(node, "it changes a value through another that is still read")
    builder.values[target] = value


def lower_concatenation(builder: PlanBuilder, call: NodeCall) -> Rows:
    if not all(isinstance(part, Rows) for part in call.first):
        raise builder.rejection(call.node, "it joins numbers of tokens with others")
    parts = [builder.without_pending(part).index for part in call.first]
    joined = calls.run_on_element_numbers(call.node, (parts, *call.args[1:]), call.kwargs)
    assert isinstance(joined, Tensor), f"{call.node.name} joins into several"
    return Rows(joined)


def picks_first_token(builder: PlanBuilder, call: NodeCall) -> bool:
    is_item = call.module is None and call.name == "getitem" and isinstance(call.first, Rows)
    return is_item and picks_first(call.first, call.args[1])


def lower_first_token(builder: PlanBuilder, call: NodeCall) -> FirstTokenRows:
    return FirstTokenRows(call.first)


def lower_constant_view(builder: PlanBuilder, call: NodeCall) -> Any:
    """Constant that is moved into the shape of numbers of tokens."""
    return run_node(call.node, builder.model, (call.first, *map(index, call.args[1:])), call.kwargs)


def lower_view_or_permutation(builder: PlanBuilder, call: NodeCall) -> Any:
    x = call.first
    return wrapped(
        calls.run_on_element_numbers(call.node, (x.index, *map(index, call.args[1:])), call.kwargs), x.pending
    )


def lower_functional_linear(builder: PlanBuilder, call: NodeCall) -> Rows:
    def lower(x: Any, weight: Any, bias: Any = None) -> Rows:
        if not (isinstance(x, Rows) and isinstance(weight, Tensor) and weight.dim() == 2):
            raise builder.rejection(call.node, "`linear` with a computed weight is not among the engine's steps")
        linear = linears.Linear((weight.shape[0], weight.shape[1]), bias, weight=weight.detach())
        return builder.lower_linear(call.node, x, call.node.name, linear)

    return lower(*call.args, **call.kwargs)


def reject_function(builder: PlanBuilder, call: NodeCall) -> Any:
    reason = f"`{call.name}` of numbers that differ from token to token is not among the engine's steps"
    raise builder.rejection(call.node, reason)

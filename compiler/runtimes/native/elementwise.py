"""Elementwise functions of numbers of tokens: of one number they wait for the step that reads them."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from . import calls, tables
from .plan_builder import PlanBuilder
from .rule import NodeCall
from .values import ElementwiseExpr, Positional, Rows


def lower_unary(builder: PlanBuilder, call: NodeCall) -> Rows:
    return Rows(call.first.index, _compose_with_pending(call, call.first.pending))


def _compose_with_pending(call: NodeCall, pending: ElementwiseExpr | None) -> ElementwiseExpr:
    """An elementwise function of what is made before it."""
    if call.name == "rsqrt":
        return ElementwiseExpr(torch.reciprocal, (ElementwiseExpr(torch.sqrt, (pending,), call.node),), call.node)
    compute, options = calls.UNARY[call.name], call.args[1:]
    options_kw = {key: value for key, value in call.kwargs.items() if key != "inplace"}
    return ElementwiseExpr(lambda x: compute(x, *options, **options_kw), (pending,), call.node)


def lower_activation(builder: PlanBuilder, call: NodeCall) -> Rows:
    assert isinstance(call.module, nn.Module), f"{call.node.name} calls no module"
    return Rows(call.first.index, ElementwiseExpr(call.module, (call.first.pending,), call.node))


def lower_binary(builder: PlanBuilder, call: NodeCall) -> Rows:
    return lower_binary_operands(builder, call.node, call.name, *call.args)


def lower_binary_operands(builder: PlanBuilder, node: fx.Node, name: str, a: Any, b: Any) -> Rows:
    compute = calls.BINARY[name]
    for x, y in ((a, b), (b, a)):
        single = isinstance(y, (int, float)) or (isinstance(y, Tensor) and y.dim() == 0)
        if isinstance(x, Rows) and single:
            operands = (x.pending, float(y)) if x is a else (float(y), x.pending)
            return Rows(x.index, ElementwiseExpr(compute, operands, node))
    if isinstance(a, Rows) and isinstance(b, Rows):
        if a.index.shape == b.index.shape and torch.equal(a.index, b.index):
            return Rows(a.index, ElementwiseExpr(compute, (a.pending, b.pending), node))
        return builder.elementwise_of_two(name, a, b)
    for x, y in ((a, b), (b, a)):
        if isinstance(x, Rows) and isinstance(y, Tensor):
            return builder.elementwise_with_vector(node, name, x, y, swapped=x is b)
        if isinstance(x, Rows) and isinstance(y, Positional) and name in ("add", "mul"):
            table = tables.append_position_table(builder, node, y)
            return x if table is None else builder.elementwise_of_two(name, x, table)
    raise builder.rejection(node, f"`{name}` of these operands is not among the engine's steps")


def lower_where(builder: PlanBuilder, call: NodeCall) -> Rows:
    """A choice by a number of what is made of that number."""
    which, a, b = call.args
    parts = [part for part in (which, a, b) if isinstance(part, Rows)]
    numbers = [part for part in (a, b) if isinstance(part, (int, float))]
    same_source = all(torch.equal(part.index, parts[0].index) for part in parts[1:])
    if not isinstance(which, Rows) or len(parts) + len(numbers) != 3 or not same_source:
        raise builder.rejection(call.node, "a choice between values that more than one number decides")
    operands = [part.pending if isinstance(part, Rows) else float(part) for part in (which, a, b)]
    return Rows(which.index, ElementwiseExpr(torch.where, tuple(operands), call.node))

"""Modules of one operand, and the rejection of those that no rule knows."""

from types import NotImplementedType
from typing import NoReturn

from . import linears
from .plan_builder import PlanBuilder
from .rule import NodeCall, Predicate
from .values import Rows


def is_layer_of_role(role: str) -> Predicate:
    """Predicate of modules of a role that take numbers of tokens alone."""

    def matches(builder: PlanBuilder, call: NodeCall) -> bool:
        is_unary = len(call.args) == 1 and not call.kwargs and isinstance(call.first, Rows)
        return call.module is not None and call.role == role and is_unary

    return matches


def lower_linear(builder: PlanBuilder, call: NodeCall) -> Rows | NotImplementedType:
    linear = None if call.module is None else linears.recognise_linear(call.module)
    if linear is None:
        return NotImplemented
    return builder.lower_linear(call.node, call.first, str(call.node.target), linear)


def reject_module(builder: PlanBuilder, call: NodeCall) -> NoReturn:
    raise builder.rejection(call.node, f"a {type(call.module).__name__} is not among the engine's steps")

"""Values that are no numbers of tokens: inputs, attributes, masks, what positions alone decide, and constants."""

from typing import Any

import torch
from torch import Tensor

from . import calls
from .plan_builder import PlanBuilder
from .positional import run_node
from .rule import NodeCall
from .trees import attribute
from .values import CACHE, Mask, Positional, Rows


def is_placeholder(builder: PlanBuilder, call: NodeCall) -> bool:
    return call.node.op == "placeholder"


def lower_placeholder(builder: PlanBuilder, call: NodeCall) -> Any:
    name = builder.side.placeholder_role(str(call.node.target))
    if name == "input_ids":
        return Rows(builder.rows(builder.ids.register).view(builder.shape))
    if call.node.target == "cache":
        return CACHE
    return Positional(call.node) if name in ("position_ids", "attention_mask") else None


def is_attribute(builder: PlanBuilder, call: NodeCall) -> bool:
    return call.node.op == "get_attr"


def lower_attribute(builder: PlanBuilder, call: NodeCall) -> Any:
    return attribute(builder.model, str(call.node.target))


def lower_mask(builder: PlanBuilder, call: NodeCall) -> Mask:
    return Mask(call.node)


def lower_positions(builder: PlanBuilder, call: NodeCall) -> Positional:
    return Positional(call.node)


def is_positional(builder: PlanBuilder, call: NodeCall) -> bool:
    return not call.of_tokens and any(isinstance(x, Positional) for x in call.operands)


def lower_positional(builder: PlanBuilder, call: NodeCall) -> Any:
    return lower_size_of_sample(builder, call) if call.name in calls.SIZE_CALLS else Positional(call.node)


def reads_cache(builder: PlanBuilder, call: NodeCall) -> bool:
    return not call.of_tokens and any(x is CACHE for x in call.operands)


def reject_cache(builder: PlanBuilder, call: NodeCall) -> Any:
    raise builder.rejection(call.node, "it reads the cache otherwise than by keys and values")


def is_constant(builder: PlanBuilder, call: NodeCall) -> bool:
    return not call.of_tokens


@torch.no_grad()
def lower_constant(builder: PlanBuilder, call: NodeCall) -> Any:
    if call.role == "embedding" and builder.positions.grows_with_length(call.node):
        return Positional(call.node)  # it is handed how many tokens there are
    return run_node(call.node, builder.model, call.args, call.kwargs)


def lower_size_of_sample(builder: PlanBuilder, call: NodeCall) -> Any:
    """A size of something that depends on positions alone: that of the sample batch."""
    of: Any = call.node.args[0]
    shape = of.meta.get("shape")
    if not isinstance(shape, tuple) or not all(type(n) is int for n in shape):
        return Positional(call.node)
    return run_node(call.node, builder.model, (torch.empty(shape, device="meta"), *call.args[1:]), {})


def lower_size_of(builder: PlanBuilder, call: NodeCall, index: Tensor) -> Any:
    """A size of a value that has the shape of an index."""
    return run_node(call.node, builder.model, (index, *call.args[1:]), {})

"""Modules that choose the keys to which a token attends: of no more than they may choose, they choose all.

Up to that length of a text they decide nothing, and the engine's context ends there. They are recognised by what they
give for texts as long as a number that they hold, and longer ones.
"""

import copy
from types import NotImplementedType
from typing import Any

import torch
from torch import Tensor, nn

from .plan_builder import PlanBuilder
from .rule import NodeCall
from .trees import mapped
from .values import CACHE, AllPositions, CachedRows, Positional, Rows

_SHORT_LENGTH, _LONG_LENGTH = 4, 7  # tokens


def lower_choice_of_all_positions(builder: PlanBuilder, call: NodeCall) -> AllPositions | NotImplementedType:
    """All positions, where a module chooses among no more than it may."""
    mixed = any(isinstance(x, Rows) for x in call.operands) and any(isinstance(x, Positional) for x in call.operands)
    if (
        not mixed
        or call.module is None
        or not _selects_all_and_limit_context(builder, call.module, call.args, call.kwargs)
    ):
        return NotImplemented
    return AllPositions(call.node)


@torch.no_grad()
def _selects_all_and_limit_context(builder: PlanBuilder, module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a module names every position for each token of a context, which is made as short as that asks."""
    module = copy.deepcopy(module).float()
    for name, count in vars(module).items():
        if type(count) is not int or count < 1:
            continue
        light = copy.copy(module)
        setattr(light, name, _SHORT_LENGTH)
        short_choice = _selected_positions(builder, light, args, kwargs, _SHORT_LENGTH)
        long_choice = _selected_positions(builder, light, args, kwargs, _LONG_LENGTH)
        chosen_at_limit = _selected_positions(builder, module, args, kwargs, min(count, _LONG_LENGTH))
        if (
            _selects_every_position(short_choice, _SHORT_LENGTH)
            and long_choice is not None
            and long_choice.shape == (1, _LONG_LENGTH, _SHORT_LENGTH)
            and _selects_every_position(chosen_at_limit, min(count, _LONG_LENGTH))
        ):
            builder.plan.context = min(builder.plan.context, count)
            return True
    return False


def _selects_every_position(position_indices: Tensor | None, length: int) -> bool:
    everything = torch.arange(length).expand(1, length, length)
    return (
        position_indices is not None
        and position_indices.shape == everything.shape
        and torch.equal(position_indices.long().sort(-1).values, everything)
    )


def _selected_positions(builder: PlanBuilder, module: nn.Module, args: Any, kwargs: Any, length: int) -> Tensor | None:
    """Token indices that a module chooses for random numbers of a text's tokens, or None."""
    generator = torch.Generator().manual_seed(length)

    def operand(value: Any) -> Any:
        if isinstance(value, (Rows, CachedRows)):
            rows = value.rows if isinstance(value, CachedRows) else value
            return torch.randn(builder.positions.shape_for_length(rows.index, length)[0], generator=generator)
        if isinstance(value, Positional):
            at_positions = builder.positions.at(value.node, length)
            return torch.zeros(1, length, length) if at_positions is None else at_positions  # a mask that hides nothing
        return None if value is CACHE else value

    try:
        at_positions = module(*mapped(args, operand), **mapped(kwargs, operand))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # made for something else
        return None
    return at_positions if isinstance(at_positions, Tensor) and not at_positions.is_floating_point() else None

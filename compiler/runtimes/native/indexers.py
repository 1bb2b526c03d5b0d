"""Modules that choose the keys to which a token attends: of no more than they may choose, they choose all.

Up to that length of a text they decide nothing, and the engine's context ends there. They are recognised by what they
give for texts as long as a number that they hold, and longer ones.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .trees import leaves, mapped
from .values import CACHE, Cached, Positional, Rows

if TYPE_CHECKING:
    from .reader import Reader

_FEW, _MORE = 4, 7  # tokens


@torch.no_grad()
def names_all(reader: "Reader", module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a module names every position for each token of a context, which is made as short as that asks."""
    given = leaves((args, kwargs))
    if not any(isinstance(x, Rows) for x in given) or not any(isinstance(x, Positional) for x in given):
        return False
    module = copy.deepcopy(module).float()
    for name, count in vars(module).items():
        if type(count) is not int or count < 1:
            continue
        light = copy.copy(module)
        setattr(light, name, _FEW)
        few = _chosen(reader, light, args, kwargs, _FEW)
        more = _chosen(reader, light, args, kwargs, _MORE)
        own = _chosen(reader, module, args, kwargs, min(count, _MORE))
        if (
            _are_all(few, _FEW)
            and more is not None
            and more.shape == (1, _MORE, _FEW)
            and _are_all(own, min(count, _MORE))
        ):
            reader.plan.context = min(reader.plan.context, count)
            return True
    return False


def _are_all(found: Tensor | None, length: int) -> bool:
    everything = torch.arange(length).expand(1, length, length)
    return (
        found is not None and found.shape == everything.shape and torch.equal(found.long().sort(-1).values, everything)
    )


def _chosen(reader: "Reader", module: nn.Module, args: Any, kwargs: Any, length: int) -> Tensor | None:
    """What a module makes of random numbers of a text's tokens, if those are numbers of tokens."""
    generator = torch.Generator().manual_seed(length)

    def operand(value: Any) -> Any:
        if isinstance(value, (Rows, Cached)):
            rows = value.rows if isinstance(value, Cached) else value
            return torch.randn(reader.positions.scaled(rows.index, length)[0], generator=generator)
        if isinstance(value, Positional):
            found = reader.positions.at(value.node, length)
            return torch.zeros(1, length, length) if found is None else found  # a mask that hides nothing
        return None if value is CACHE else value

    try:
        found = module(*mapped(args, operand), **mapped(kwargs, operand))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # made for something else
        return None
    return found if isinstance(found, Tensor) and not found.is_floating_point() else None

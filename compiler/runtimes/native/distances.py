"""What scores of attention gain by distance, as a table: found by computing it for a row, whatever makes it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ROW = 512  # tokens of the row for which it is computed, unless a config names a larger distance
_MOST_ROW = 4096
_TIMES = 3  # so many times the largest distance that a config names


def of_row(made: Any, length: int) -> bool:
    """Whether a value is one number for each head, query and key of a row of so many tokens: [1 or heads.., n, n]."""
    square = isinstance(made, Tensor) and made.is_floating_point() and made.dim() == 4
    return square and made.shape[0] == 1 and tuple(made.shape[2:]) == (length, length)


@torch.no_grad()
def table(at: Callable[[int], Tensor], heads: int, whole: bool, config: Any, context: int) -> tuple[Tensor, int] | None:
    """[heads, columns] float32 by distance, and how many tokens of a text it holds for; None where more than distance
    counts.

    The last column is that of the token itself, those before it of as many tokens back; of a text that is seen `whole`
    it is the one in the middle. What lies further off counts as the outermost column.
    at   the length of a row -> [1, heads, n, n]
    """
    named = (getattr(config, name, None) for name in vars(config) if name.endswith("max_distance"))
    far = max((_TIMES * n for n in named if type(n) is int), default=0)
    length = min(max(_ROW, far), _MOST_ROW, context)
    found = at(length).float()
    if not of_row(found, length):
        return None
    square = found[0].expand(heads, length, length)
    back, ahead = square[:, :, 0].flip(1), square[:, 0, 1:]  # -(length - 1)..0, then 1..length - 1
    line = torch.cat([back, ahead], 1) if whole else back
    if not _is_of_distance(square, torch.cat([back, ahead], 1), whole):
        return None
    kept = max(_steady(back.flip(1)), _steady(torch.cat([back[:, -1:], ahead], 1)) if whole else 0)
    if 2 * kept >= length:  # it may go on to change
        return line.contiguous(), length
    middle = length - 1
    return line[:, middle - kept : middle + 1 + (kept if whole else 0)].contiguous(), context


def _is_of_distance(square: Tensor, line: Tensor, whole: bool) -> bool:
    """Whether each number is that of its distance; without `whole` those ahead of a token do not count."""
    places = torch.arange(square.shape[1])
    distance = places[None, :] - places[:, None]
    seen = torch.ones_like(distance, dtype=torch.bool) if whole else distance <= 0
    return bool((square == line[:, distance + square.shape[1] - 1])[:, seen].all())


def _steady(line: Tensor) -> int:
    """The distance from which on nothing changes. [heads, distances], the token's own first."""
    changes = (line[:, 1:] != line[:, :-1]).any(0).nonzero()
    return int(changes[-1]) + 1 if len(changes) else 0

"""Bias of attention scores by distance, as a table, computed by running it for a row."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ROW = 512  # tokens of the row for which it is computed, unless a config names a larger distance
_MAX_ROW = 4096
_TIMES = 3  # so many times the largest distance that a config names


def is_bias_of_one_row(value: Any, length: int) -> bool:
    """Whether a value is one number for each head, query and key of a row of so many tokens: [1 or heads.., n, n]."""
    square = isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 4
    return square and value.shape[0] == 1 and tuple(value.shape[2:]) == (length, length)


@torch.no_grad()
def bias_by_distance_and_max_length(
    bias_of_length: Callable[[int], Tensor], num_heads: int, bidirectional: bool, config: Any, context: int
) -> tuple[Tensor, int] | None:
    """[heads, columns] float32 by distance, and how many tokens of a text it holds for; None where more than distance
    counts.

    The last column is that of the token itself, those before it of as many tokens back; of `bidirectional` attention
    it is the one in the middle. Tokens further away count as the outermost column.

    bias_of_length   the length of a row -> [1, heads, n, n]
    """
    named = (getattr(config, name, None) for name in vars(config) if name.endswith("max_distance"))
    far = max((_TIMES * n for n in named if type(n) is int), default=0)
    length = min(max(_ROW, far), _MAX_ROW, context)
    values = bias_of_length(length).float()
    if not is_bias_of_one_row(values, length):
        return None
    square = values[0].expand(num_heads, length, length)
    back, ahead = square[:, :, 0].flip(1), square[:, 0, 1:]  # -(length - 1)..0, then 1..length - 1
    line = torch.cat([back, ahead], 1) if bidirectional else back
    if not _depends_on_distance_only(square, torch.cat([back, ahead], 1), bidirectional):
        return None
    steady_width = max(
        _distance_of_last_change(back.flip(1)),
        _distance_of_last_change(torch.cat([back[:, -1:], ahead], 1)) if bidirectional else 0,
    )
    if 2 * steady_width >= length:  # it may go on to change
        return line.contiguous(), length
    middle = length - 1
    return line[:, middle - steady_width : middle + 1 + (steady_width if bidirectional else 0)].contiguous(), context


def _depends_on_distance_only(square: Tensor, line: Tensor, bidirectional: bool) -> bool:
    """Whether each number is that of its distance; without `bidirectional` those ahead of a token do not count."""
    positions = torch.arange(square.shape[1])
    distance = positions[None, :] - positions[:, None]
    visible = torch.ones_like(distance, dtype=torch.bool) if bidirectional else distance <= 0
    return bool((square == line[:, distance + square.shape[1] - 1])[:, visible].all())


def _distance_of_last_change(line: Tensor) -> int:
    """The distance from which on nothing changes. [heads, distances], the token's own first."""
    changes = (line[:, 1:] != line[:, :-1]).any(0).nonzero()
    return int(changes[-1]) + 1 if len(changes) else 0

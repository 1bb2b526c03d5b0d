"""Rotary positions: frequencies fitted to tables, and the form of a rotation found by trying it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ir import leaves

_SHARE = 3e-5           # tables are float32, angles at their end too
_ROWS = 8192            # positions that are compared at once: contexts are long


@dataclass(frozen=True)
class Frequencies:
    """cos and sin of position * frequency, both times `scale`."""

    values: Tensor                     # [pairs] float32
    scale: float


@dataclass(frozen=True)
class Rotation:
    """`width` leading columns of every head turn, pair i of them by frequency i.

    interleaved   a pair is (2i, 2i + 1), else (i, i + width / 2)
    """

    frequencies: Frequencies
    width: int
    interleaved: bool


def fitted(cos: Tensor, sin: Tensor) -> Frequencies | None:
    """Frequencies of tables [positions, pairs] whose row is the position; None where they are none.

    An angle at position 1 is the frequency; at every power of two, which a float32 product keeps exact, it is
    known to twice the precision.
    """
    count = len(cos)
    scale = round(float((cos.square() + sin.square()).double().mean().sqrt()), 7)       # of float32 tables
    if count < 2 or scale == 0:
        return None
    estimate, position = torch.atan2(sin[1].double(), cos[1].double()), 1
    while 2 * position < count:
        position *= 2
        seen = torch.atan2(sin[position].double(), cos[position].double())
        turns = ((estimate * position - seen) / (2 * math.pi)).round()
        estimate = (seen + 2 * math.pi * turns) / position
    values = estimate.float()
    share = max(_SHARE, 3e-7 * count)                  # a frequency is rounded at 2**-24 of an angle
    for start in range(0, count, _ROWS):
        rows = slice(start, min(start + _ROWS, count))
        angles = (torch.arange(rows.start, rows.stop)[:, None].float() * values).double()
        pairs = ((angles.cos(), cos[rows]), (angles.sin(), sin[rows]))
        if not all(torch.allclose(ours * scale, theirs.double(), atol=share * scale, rtol=0) for ours, theirs in pairs):
            return None
    return Frequencies(values, scale)


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [..., t, width] by tables [t, width / 2]."""
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@torch.no_grad()
def recognise(module: nn.Module, cos: Tensor, sin: Tensor, heads: tuple[int, int], head_dim: int,
              options: dict[str, Any]) -> Rotation | None:
    """The form of `apply_rotary_pos_emb` of the file in which the module's class is written, or None.

    cos, sin   [positions, columns], as the module is handed them
    """
    generator, length = torch.Generator().manual_seed(0), min(5, len(cos))
    q, k = (torch.randn((1, h, length, head_dim), generator=generator) for h in heads)
    found = leaves.rotary(module, q, k, cos[None, :length], sin[None, :length], **options)
    columns = cos.shape[-1]
    for width in dict.fromkeys((columns, 2 * columns)):
        for held, interleaved in _forms(columns, width):
            if width > head_dim or width % 2:
                continue
            c, s = cos[:, held], sin[:, held]
            start = (c[:length], s[:length], interleaved)
            ours = [torch.cat([turned(x[..., :width], *start), x[..., width:]], -1) for x in (q, k)]
            pairs = zip(found, ours, strict=True)
            if all(torch.allclose(a.float(), b, atol=1e-5, rtol=1e-5) for a, b in pairs):
                frequencies = fitted(c, s)
                return frequencies and Rotation(frequencies, width, interleaved)
    return None


def _forms(columns: int, width: int) -> list[tuple[slice, bool]]:
    """Which columns of the tables hold the pairs, and how pairs lie in a head."""
    if width == columns:
        half = slice(0, columns // 2)
        return [(half, False), (slice(0, columns, 2), True), (half, True)]
    return [(slice(0, columns), False), (slice(0, columns), True)]

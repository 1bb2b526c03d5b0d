"""Rotary positions, recognised by what a function does to columns: which turn together, how far, where they end up."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_SHARE = 3e-5  # tables are float32, angles at their end too
_HALVES = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # how far rounding takes a table's number
ROWS = 8192  # positions that are looked at at once: contexts are long
PROBE = 16  # positions at which every column is looked at

# x [heads, t, width], first position -> the same turned, as positions first, first + 1, ... turn it
RotationFunction = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Frequencies:
    """cos and sin of position * frequency, both times `scale`."""

    values: Tensor  # [pairs] float32
    scale: float


@dataclass(frozen=True)
class Rotation:
    """`width` leading columns of every head turn, pair i of them by frequency i; none where width is 0.

    interleaved   a pair is (2i, 2i + 1), else (i, i + width / 2)
    order         [head_dim] where each column ends up: some functions sort pairs on the way
    """

    frequencies: Frequencies
    width: int
    interleaved: bool
    order: Tensor

    def pairs(self) -> tuple[Tensor, Tensor]:
        """The first and the second column of every pair."""
        half = torch.arange(self.width // 2)
        return (2 * half, 2 * half + 1) if self.interleaved else (half, half + self.width // 2)


def fit_frequencies(cos: Tensor, sin: Tensor) -> Frequencies | None:
    """Frequencies of tables [positions, pairs] whose row is the position; None where they are none.

    An angle at position 1 is the frequency; at every power of two, which a float32 product keeps exact, it is
    known to twice the precision.
    """
    count, rounding = len(cos), _table_rounding(cos, sin)
    scale = round(float((cos.square() + sin.square()).double().mean().sqrt()), 7)  # of float32 tables
    scale = 1.0 if abs(scale - 1) < rounding else scale
    if count < 2 or scale == 0:
        return None
    estimate, position = torch.atan2(sin[1].double(), cos[1].double()), 1
    while 2 * position < count:
        position *= 2
        angle = torch.atan2(sin[position].double(), cos[position].double())
        revolutions = ((estimate * position - angle) / (2 * math.pi)).round()
        estimate = (angle + 2 * math.pi * revolutions) / position
    values = estimate.float()
    share = max(_SHARE, 3e-7 * count, rounding)  # a frequency is rounded at 2**-24 of an angle
    for start in range(0, count, ROWS):
        rows = slice(start, min(start + ROWS, count))
        angles = (torch.arange(rows.start, rows.stop)[:, None].float() * values).double()
        pairs = ((angles.cos(), cos[rows]), (angles.sin(), sin[rows]))
        if not all(
            torch.allclose(actual * scale, expected.double(), atol=share * scale, rtol=0) for actual, expected in pairs
        ):
            return None
    return Frequencies(values, scale)


def _table_rounding(*tables: Tensor) -> float:
    """Rounding error of tables that a model stores in half precision; 0 of others."""
    return next(
        (
            share
            for dtype, share in _HALVES.items()
            if all(torch.equal(table, table.to(dtype).float()) for table in tables)
        ),
        0.0,
    )


def apply_rotation(x: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation) -> Tensor:
    """x [..., t, head_dim] by tables [t, width / 2]."""
    first, second = rotation.pairs()
    y = x.clone()
    y[..., first] = x[..., first] * cos - x[..., second] * sin
    y[..., second] = x[..., second] * cos + x[..., first] * sin
    ordered = torch.empty_like(y)
    ordered[..., rotation.order] = y
    return ordered


@torch.no_grad()
def recognise_rotation(rotate: RotationFunction, context: int, head_dim: int) -> Rotation | None:
    """The rotation that a function makes of the positions of a context, or None."""
    probe = min(PROBE, context)
    turned_basis = rotate(torch.eye(head_dim)[:, None].expand(head_dim, probe, head_dim), 0)  # [from, t, to]
    order = _column_permutation(turned_basis[:, 0])
    if order is None or (pairs := _rotated_width_and_interleaving(turned_basis[..., order])) is None:
        return None
    rotation = Rotation(Frequencies(torch.zeros(0), 1.0), *pairs, order)
    first, second = rotation.pairs()
    cos, sin = torch.ones(context, len(first)), torch.zeros(context, len(first))
    for start in range(0, context if len(first) else 0, ROWS):
        rows = slice(start, min(start + ROWS, context))
        x = torch.zeros(1, rows.stop - start, head_dim)
        x[..., first] = 1.0
        y = rotate(x, start)[0][:, order]
        cos[rows], sin[rows] = y[:, first], y[:, second]
    x = torch.randn((2, probe, head_dim), generator=torch.Generator().manual_seed(0))
    if not torch.allclose(rotate(x, 0), apply_rotation(x, cos[:probe], sin[:probe], rotation), atol=1e-5, rtol=1e-5):
        return None
    frequencies = fit_frequencies(cos, sin) if len(first) else rotation.frequencies
    return None if frequencies is None else Rotation(frequencies, *pairs, order)


def _column_permutation(matrix_at_0: Tensor) -> Tensor | None:
    """Permutation of columns at position 0, where nothing is rotated: of [from, to] one number each is not zero."""
    nonzero = matrix_at_0 > 0
    if not (
        torch.equal(nonzero, matrix_at_0 != 0) and bool((nonzero.sum(0) == 1).all() and (nonzero.sum(1) == 1).all())
    ):
        return None
    return nonzero.long().argmax(1)


def _rotated_width_and_interleaving(turned_basis: Tensor) -> tuple[int, bool] | None:
    """(width, interleaved) of columns that turn into each other; `turned_basis` [from, t, to]."""
    mixed = (turned_basis != 0).any(1)
    mixed.fill_diagonal_(False)
    turning = mixed.any(1).nonzero().flatten()
    if not len(turning):
        return 0, False
    partner = mixed[turning].long().argmax(1)
    if bool((mixed.sum(1) > 1).any()) or not torch.equal(mixed, mixed.T):
        return None
    if torch.equal(partner, turning ^ 1):
        return (int(turning.max()) // 2 + 1) * 2, True
    half = int((partner - turning).abs().max())
    front = turning < half
    is_half_split = torch.equal(partner, torch.where(front, turning + half, turning - half))
    return (2 * half, False) if is_half_split and int(turning.max()) < 2 * half else None

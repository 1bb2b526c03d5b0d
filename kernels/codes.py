"""Codes of a weight: those of the grid that it is on already, or int4 ones of a grid that is fitted to it."""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from .grid import Grid

BITS, MAX_CODE = 4, 15
GROUPS = (32, 64, 128)  # inputs that may share a scale
_MAX_TRIALS = 64  # outputs that are looked at before all are
_MIN_ROWS = 8  # weights of a group that are looked at before all are


@dataclass(frozen=True)
class Codes:
    """A weight [n, k] is scale * (code - zero), by groups of `group` inputs; the last one may be shorter.

    code          [n, groups * group] uint8, 0..2**bits - 1; those past the inputs stand for 0
    scale, zero   [n, groups] float32; scales are bfloat16 numbers, zeros are codes
    """

    group: int
    code: Tensor
    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class _Range:
    """Range of a grid's codes; `symmetric`: zero is the middle one."""

    bits: int
    symmetric: bool

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        return 2 ** (self.bits - 1)

    @property
    def multiples(self) -> tuple[int, ...]:
        """Multiples of the scale that a group's largest weight may be, the most likely ones first."""
        middle = self.middle
        return (middle, middle - 1, *range(middle + 1, self.max_code + 1), *range(middle - 2, 0, -1))

    def can_encode(self, min_step: Tensor, max_step: Tensor) -> Tensor:
        """Whether steps from zero, `min_step` <= 0 and `max_step` >= 0, have codes."""
        if self.symmetric:
            return (min_step >= -self.middle) & (max_step < self.middle)
        return max_step - min_step <= self.max_code

    def code_of_zero(self, min_step: Tensor, max_step: Tensor) -> Tensor:
        """Code of zero: the middle one wherever the steps leave it there."""
        above = torch.where(max_step >= self.middle, self.max_code - max_step, float(self.middle))
        return torch.where(min_step < -self.middle, -min_step, above)


def quantize_to_codes(weight: Tensor, group_size: int) -> Codes:
    """Codes of a weight [n, k]: exactly those of its grid if it is on one, of whatever group; else the nearest on
    grids of `group_size` inputs whose squared error is least.
    """
    for candidate in (group_size, *(g for g in GROUPS if g != group_size)):
        exact = codes_if_on_grid(weight, candidate)
        if exact is not None:
            return exact
    padded = _pad_inputs_to_groups(weight.float(), group_size)
    scales = Grid(BITS, group_size, symmetric=False, search=True).fit_scales(padded)
    return Codes(group_size, scales.nearest_codes(padded), scales.scale, scales.zero)


def codes_if_on_grid(weight: Tensor, group_size: int, bits: int = BITS, symmetric: bool = False) -> Codes | None:
    """The codes of a weight that is on a grid: every weight is scale * (code - zero), rounded to its dtype. Else None.

    group_size       inputs that share a scale, 0 for all of an output
    bits        2..8, of a code
    symmetric   zero is the middle code

    Source: own. Of a group the least weight is most often the scale itself, the largest a small multiple of it, and a
    scale has 8 bits.
    """
    codes, group_size = _Range(bits, symmetric), group_size or weight.shape[1]
    few_rows = weight[:_MAX_TRIALS]
    return (
        _codes_if_all_groups_on_grid(weight, group_size, codes)
        if _codes_if_all_groups_on_grid(few_rows, group_size, codes)
        else None
    )


def _codes_if_all_groups_on_grid(weight: Tensor, group_size: int, code_range: _Range) -> Codes | None:
    n = len(weight)
    groups = _pad_inputs_to_groups(weight, group_size).reshape(-1, group_size)
    steps, scale = torch.zeros_like(groups, dtype=torch.int16), torch.ones(len(groups))
    size = groups.float().abs()
    left, largest, least = (
        groups.any(1).nonzero().flatten(),
        size.amax(1),
        torch.where(size > 0, size, torch.inf).amin(1),
    )
    sample = groups[:, :: max(1, group_size // _MIN_ROWS)].contiguous()
    for extremes, multiple, nearby in ((least, 1, 0), *product((largest,), code_range.multiples, range(3))):
        if not len(left):
            break
        scales = _neighbouring_bfloat16(extremes[left] / multiple, nearby)
        likely = _steps_and_groups_on_grid(sample[left], scales, code_range)[1].nonzero().flatten()
        some, scales = left[likely], scales[likely]
        count, fits = _steps_and_groups_on_grid(groups[some], scales, code_range)
        done = some[fits]
        steps[done], scale[done] = count[fits].to(torch.int16), scales[fits]
        left = left[~torch.isin(left, done)] if len(done) else left
    if len(left):
        return None
    low, high = steps.amin(1).clamp(max=0).float(), steps.amax(1).clamp(min=0).float()
    zero = code_range.code_of_zero(low, high)
    code = (steps + zero[:, None]).to(torch.uint8)
    return Codes(group_size, code.reshape(n, -1), scale.reshape(n, -1), zero.reshape(n, -1))


def _steps_and_groups_on_grid(groups: Tensor, scale: Tensor, code_range: _Range) -> tuple[Tensor, Tensor]:
    """Steps of each weight for a scale, and whether all weights of a group [groups] are on that scale's grid."""
    count = (groups.float() / scale[:, None]).round_().clamp_(-code_range.max_code, code_range.max_code)
    low, high = count.amin(1).clamp(max=0), count.amax(1).clamp(min=0)
    return count, ((count * scale[:, None]).to(groups.dtype) == groups).all(1) & code_range.can_encode(low, high)


def _neighbouring_bfloat16(value: Tensor, neighbour: int) -> Tensor:
    """The bfloat16 number nearest to a positive one (`neighbour` 0), the next above (1), or below (2), as float32."""
    nearest = value.bfloat16().view(torch.int16) + (0, 1, -1)[neighbour]
    return nearest.clamp(min=1).view(torch.bfloat16).float()


def _pad_inputs_to_groups(weight: Tensor, group_size: int) -> Tensor:
    padding = -weight.shape[1] % group_size
    return torch.nn.functional.pad(weight, (0, padding)) if padding else weight.contiguous()

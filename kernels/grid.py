"""Grids of few values for weights: a scale, and a zero that is one of the values, per output and group of inputs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .levels import load_library
from .sequences import as_float32, call_kernel_at_active_level, data_pointer

SHARES = tuple(1 - step / 80 for step in range(40))  # of the whole range, that are tried
CACHED = 1 << 17  # weights whose scales are searched at a time


@dataclass(frozen=True)
class Grid:
    """bits 2..8; group: inputs that share a scale, 0 for all of an output; symmetric: zero is the middle code.

    search   scales for which the squared error is least, weighed by the inputs' squares where they are known;
             else those that reach the largest weight
    """

    bits: int
    group: int
    symmetric: bool
    search: bool

    @property
    def max_code(self) -> int:
        """The largest code; the least is 0."""
        return 2**self.bits - 1

    def width(self, n_inputs: int) -> int:
        return self.group or n_inputs

    def bits_per_weight(self, n_inputs: int) -> float:
        """Codes, a scale in 16 bits, and a zero where it is not the middle."""
        per_group = 16 + (0 if self.symmetric else self.bits)
        return self.bits + per_group / self.width(n_inputs)

    def fit_scales(self, weight: Tensor, input_squares: Tensor | None = None) -> "Scales":
        """Scales of every group.

        weight    [out, in] float32, groups divide `in`
        input_squares   [in] summed squares of the inputs
        """
        groups = weight.reshape(weight.shape[0], -1, self.width(weight.shape[1]))  # [out, groups, group]
        worth = None if input_squares is None else input_squares.reshape(groups.shape[1:])
        if self.search and weight.device.type == "cpu" and weight.dtype is torch.float32 and load_library() is not None:
            return self._fit_scales_by_kernel(groups.contiguous(), None if worth is None else as_float32(worth))
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        if not self.search:
            return self._scales_covering_range(low, high)
        rows = max(1, CACHED // weight.shape[1])
        cuts = zip(groups.split(rows), low.split(rows), high.split(rows), strict=True)
        fits = [self._search_scales(*cut, worth) for cut in cuts]
        scale, zero = (torch.cat(parts) for parts in zip(*fits, strict=True))
        return Scales(self.max_code, scale, zero)

    def _fit_scales_by_kernel(self, groups: Tensor, column_weights: Tensor | None) -> "Scales":
        """Scales of contiguous groups [out, groups, group] on a CPU, at the speed of its vectors."""
        scale, zero = torch.empty(groups.shape[:2]), torch.empty(groups.shape[:2])
        shares, (_, period, width) = torch.tensor(SHARES, dtype=torch.float32), groups.shape
        pointers = map(data_pointer, (groups, column_weights, shares, scale, zero))
        counts = scale.numel(), width, period, len(SHARES)
        call_kernel_at_active_level(
            "fit_grids", *pointers, *counts, float(self.max_code), self.symmetric, torch.get_num_threads()
        )
        return Scales(self.max_code, scale, zero)

    def _search_scales(
        self, groups: Tensor, low: Tensor, high: Tensor, column_weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Scales and zeros [rows, groups] of least error for a few rows; what it works on stays in the cache.

        Groups lie side by side, [group, rows * groups], so that a vector holds as many groups.
        """
        count = groups.shape[:2].numel()
        flat = groups.reshape(count, -1).T.contiguous()
        weighed = (
            None if column_weights is None else column_weights.expand(groups.shape).reshape(count, -1).T.contiguous()
        )
        low, high, residual = low.reshape(-1), high.reshape(-1), torch.empty_like(flat)
        best, least = self._scales_covering_range(low, high), torch.full_like(low, float("inf"))
        for share in SHARES:
            trial = self._scales_covering_range(low * share, high * share)
            torch.div(flat, trial.scale, out=residual).round_().add_(trial.zero).clamp_(0, self.max_code)
            residual.sub_(trial.zero).mul_(trial.scale).sub_(flat).square_()
            error = (residual if weighed is None else residual.mul_(weighed)).sum(0)
            better = error < least
            least = torch.where(better, error, least)
            best = Scales(
                self.max_code, torch.where(better, trial.scale, best.scale), torch.where(better, trial.zero, best.zero)
            )
        return best.scale.view(groups.shape[:2]), best.zero.view(groups.shape[:2])

    def _scales_covering_range(self, low: Tensor, high: Tensor) -> "Scales":
        """Grids over ranges [out, groups] that have 0 in them; of width 2 where a range is empty.

        Source: `Quantizer.find_params` of GPTQ (Frantar et al. 2022, arXiv 2210.17323); scales are bfloat16, as the
        kernels keep them, and no less than there.
        """
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        empty = low == high
        low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
        scale = round_up_to_bfloat16((high - low) / self.max_code)
        zero = torch.full_like(scale, (self.max_code + 1) // 2) if self.symmetric else (-low / scale).round()
        return Scales(self.max_code, scale, zero)


@dataclass(frozen=True)
class Scales:
    """scale, zero [out, groups] float32: code c stands for scale * (c - zero), so that 0 is always a value."""

    max_code: int
    scale: Tensor
    zero: Tensor

    def round_groups_to_grid(self, groups: Tensor) -> Tensor:
        """[out, groups, group] -> the nearest values of each group's grid."""
        return self._nearest(groups, self.scale[:, :, None], self.zero[:, :, None])

    def nearest_codes(self, weight: Tensor) -> Tensor:
        """[out, in] -> the codes [out, in] uint8 of the nearest values."""
        groups = weight.reshape(weight.shape[0], self.scale.shape[1], -1)
        coded = torch.div(groups, self.scale[:, :, None]).round_().add_(self.zero[:, :, None])
        return coded.clamp_(0, self.max_code).to(torch.uint8).reshape(weight.shape)

    def round(self, weight: Tensor) -> Tensor:
        """[out, in] -> the nearest values."""
        groups = weight.reshape(weight.shape[0], self.scale.shape[1], -1)
        return self.round_groups_to_grid(groups).reshape(weight.shape)

    def round_column(self, w: Tensor, group_index: int) -> Tensor:
        """[out] -> the nearest values of one group's grids."""
        return self._nearest(w, self.scale[:, group_index], self.zero[:, group_index])

    def _code(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return ((w / scale).round() + zero).clamp(0, self.max_code)

    def _nearest(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return scale * (self._code(w, scale, zero) - zero)


def concatenate_scales(pieces: Sequence[Scales]) -> Scales:
    """Scales of neighbouring groups, as one."""
    scale, zero = (torch.cat([getattr(part, name) for part in pieces], 1) for name in ("scale", "zero"))
    return Scales(pieces[0].max_code, scale, zero)


def round_up_to_bfloat16(value: Tensor) -> Tensor:
    """The least bfloat16 numbers that are not below positive float32 ones, as float32."""
    bits = value.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)

"""Grids of few values for weights: a scale, and a zero that is one of the values, per output and group of inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

SHRINKS, LEAST = 40, 0.5  # ranges that are tried, from the whole one down to this share of it


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
    def most(self) -> int:
        """The largest code; the least is 0."""
        return 2**self.bits - 1

    def width(self, inside: int) -> int:
        return self.group or inside

    def bits_per_weight(self, inside: int) -> float:
        """Codes, a scale in 16 bits, and a zero where it is not the middle."""
        more = 16 + (0 if self.symmetric else self.bits)
        return self.bits + more / self.width(inside)

    def fit(self, weight: Tensor, squares: Tensor | None = None) -> "Scales":
        """Scales of every group.

        weight    [out, in] float32, groups divide `in`
        squares   [in] summed squares of the inputs
        """
        groups = weight.reshape(weight.shape[0], -1, self.width(weight.shape[1]))  # [out, groups, group]
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        if not self.search:
            return self._over(low, high)
        worth = torch.ones_like(groups[:1]) if squares is None else squares.reshape(1, *groups.shape[1:])
        best, least = self._over(low, high), torch.full_like(low, float("inf"))
        for step in range(SHRINKS):
            share = 1 - (1 - LEAST) * step / SHRINKS
            tried = self._over(low * share, high * share)
            lost = ((tried.round_groups(groups) - groups).square() * worth).sum(2)
            better = lost < least
            least = torch.where(better, lost, least)
            best = Scales(
                self.most, torch.where(better, tried.scale, best.scale), torch.where(better, tried.zero, best.zero)
            )
        return best

    def _over(self, low: Tensor, high: Tensor) -> "Scales":
        """Grids over ranges [out, groups] that have 0 in them; of width 2 where a range is empty.

        Source: `Quantizer.find_params` of GPTQ (Frantar et al. 2022, arXiv 2210.17323); scales are bfloat16, as the
        kernels keep them, and no less than there.
        """
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        empty = low == high
        low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
        scale = no_less((high - low) / self.most)
        zero = torch.full_like(scale, (self.most + 1) // 2) if self.symmetric else (-low / scale).round()
        return Scales(self.most, scale, zero)


@dataclass(frozen=True)
class Scales:
    """scale, zero [out, groups] float32: code c stands for scale * (c - zero), so that 0 is always a value."""

    most: int
    scale: Tensor
    zero: Tensor

    def round_groups(self, groups: Tensor) -> Tensor:
        """[out, groups, group] -> the nearest values of each group's grid."""
        return self._nearest(groups, self.scale[:, :, None], self.zero[:, :, None])

    def codes(self, weight: Tensor) -> Tensor:
        """[out, in] -> the codes [out, in] uint8 of the nearest values."""
        groups = weight.reshape(weight.shape[0], self.scale.shape[1], -1)
        found = self._code(groups, self.scale[:, :, None], self.zero[:, :, None])
        return found.to(torch.uint8).reshape(weight.shape)

    def round(self, weight: Tensor) -> Tensor:
        """[out, in] -> the nearest values."""
        groups = weight.reshape(weight.shape[0], self.scale.shape[1], -1)
        return self.round_groups(groups).reshape(weight.shape)

    def round_column(self, w: Tensor, group: int) -> Tensor:
        """[out] -> the nearest values of one group's grids."""
        return self._nearest(w, self.scale[:, group], self.zero[:, group])

    def _code(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return ((w / scale).round() + zero).clamp(0, self.most)

    def _nearest(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return scale * (self._code(w, scale, zero) - zero)


def no_less(value: Tensor) -> Tensor:
    """The least bfloat16 numbers that are not below positive float32 ones, as float32."""
    bits = value.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)

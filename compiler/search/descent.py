"""Codes and scales of a weight on a grid, looked at again and again: each for what all the others are now.

All work on a weight W [out, in] and the sums H = sum of x x^T [in, in] over its inputs, and lower the squared error of
the outputs, the trace of (Q - W) H (Q - W)^T; none of the steps raises it.
"""

import torch
from torch import Tensor

from ...kernels.grid import Scales

BLOCK = 128  # columns whose effect on each other is followed one by one, on the others all at once


@torch.no_grad()
def descend(
    weight: Tensor, gram: Tensor, scales: Scales, first: Tensor, keep: Tensor | None, sweeps: int
) -> tuple[Tensor, Scales]:
    """Values on grids, and their scales, no worse than `first` over the inputs.

    weight   [out, in] float32
    gram     [in, in] float32, its diagonal positive
    first    [out, in] values on the grids of `scales`
    keep     [out, in] bool: where it is False values are and stay 0
    sweeps   how often scales are fitted to the codes, and then every code is looked at
    Source: the descent is QuantEase (Behdin et al. 2023, arXiv 2309.01885), algorithm 2; fitting the scales between is
    own: least squares over all groups of an output at once.
    """
    values = first
    for _ in range(sweeps):
        scales, values = fit_scales(weight, gram, scales, values)
        values = sweep(weight, gram, scales, values, keep)
    return values, scales


def sweep(weight: Tensor, gram: Tensor, scales: Scales, values: Tensor, keep: Tensor | None) -> Tensor:
    """Every column becomes what is best for the outputs while the others stay, one after another."""
    width, values = weight.shape[1] // scales.scale.shape[1], values.clone()
    slope = (values - weight) @ gram  # half the error's gradient, [out, in]
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        near, inner = slope[:, start:stop].T.contiguous(), gram[start:stop, start:stop]  # [block, out]
        moved = torch.empty_like(near)
        for i, column in enumerate(range(start, stop)):
            wanted = values[:, column] - near[i] / inner[i, i]
            new = scales.round_column(wanted, column // width)
            if keep is not None:
                new = torch.where(keep[:, column], new, 0.0)
            moved[i] = new - values[:, column]
            values[:, column] = new
            near[i + 1 :].addr_(inner[i, i + 1 :], moved[i])
        slope.addmm_(moved.T, gram[start:stop])
    return values


def fit_scales(weight: Tensor, gram: Tensor, scales: Scales, values: Tensor) -> tuple[Scales, Tensor]:
    """Scales that are best for the outputs while the codes stay; as they were where that is no gain.

    With the steps C = code - zero of an output, its error is a square in its scales: A s = b with A the sums of
    C H C^T over pairs of groups and b those of C H w.
    """
    count, width = scales.scale.shape[1], weight.shape[1] // scales.scale.shape[1]
    steps = (values.unflatten(1, (count, width)) / scales.scale[:, :, None]).round()  # [out, groups, group]
    pairs = weight.new_empty(len(weight), count, count)
    for g in range(count):
        seen = steps[:, g] @ gram[g * width : (g + 1) * width]  # [out, in]
        pairs[:, g] = (seen.unflatten(1, (count, width)) * steps).sum(2)
    wanted = ((weight @ gram).unflatten(1, (count, width)) * steps).sum(2)  # [out, groups]
    used = steps.any(2)  # a group of zeros asks for nothing
    pairs.diagonal(dim1=1, dim2=2).add_(torch.where(used, 1e-6 * pairs.diagonal(dim1=1, dim2=2), 1.0))
    best = torch.linalg.solve(pairs.double(), wanted.double()).float().bfloat16().float()
    near = used & (best > 0.5 * scales.scale) & (best < 2 * scales.scale)
    best = torch.where(near, best, scales.scale)
    found = (steps * best[:, :, None]).flatten(1)
    gains = _lost(weight, gram, found) < _lost(weight, gram, values)  # [out]
    scale = torch.where(gains[:, None], best, scales.scale)
    return Scales(scales.most, scale, scales.zero), torch.where(gains[:, None], found, values)


def _lost(weight: Tensor, gram: Tensor, values: Tensor) -> Tensor:
    """The squared error of every output, [out]."""
    apart = values - weight
    return ((apart @ gram) * apart).sum(1)

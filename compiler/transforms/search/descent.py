"""Codes and scales of a weight on a grid, looked at again and again: each for what all the others are now.

All work on a weight W [out, in] and the sums H = sum of x x^T [in, in] over its inputs, and lower the squared error of
the outputs, the trace of (Q - W) H (Q - W)^T; none of the steps raises it.
"""

import torch
from torch import Tensor

from ....kernels.grid import Scales

SQUARES = 1 << 23  # numbers of the systems for scales that are held at once, twice in float64
BLOCK = 128  # columns whose effect on each other is followed one by one, on the others all at once


@torch.no_grad()
def coordinate_descent(
    weight: Tensor,
    input_gram: Tensor,
    scales: Scales,
    initial_values: Tensor,
    keep_mask: Tensor | None,
    sweep_count: int,
) -> tuple[Tensor, Scales]:
    """Values on grids, and their scales, no worse than `initial_values` over the inputs.

    weight    [out, in] float32
    input_gram  [in, in] float32, its diagonal positive
    initial_values  [out, in] values on the grids of `scales`
    keep_mask  [out, in] bool: where it is False values are and stay 0
    sweep_count  how often scales are fitted to the codes, and then every code is looked at
    Source: the descent is QuantEase (Behdin et al. 2023, arXiv 2309.01885), algorithm 2; fitting the scales between is
    own: least squares over all groups of an output at once.
    """
    values = initial_values
    for _ in range(sweep_count):
        scales, values = refit_scales_and_values(weight, input_gram, scales, values)
        values = sweep_coordinate_descent(weight, input_gram, scales, values, keep_mask)
    return values, scales


def sweep_coordinate_descent(
    weight: Tensor, input_gram: Tensor, scales: Scales, grid_values: Tensor, keep_mask: Tensor | None
) -> Tensor:
    """Coordinate descent over columns: set each in turn to what is best for the outputs while the others stay."""
    width, grid_values = weight.shape[1] // scales.scale.shape[1], grid_values.clone()
    slope = (grid_values - weight) @ input_gram  # half the error's gradient, [out, in]
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        block_slope, inner = slope[:, start:stop].T.contiguous(), input_gram[start:stop, start:stop]  # [block, out]
        steps = torch.empty_like(block_slope)
        for i, column in enumerate(range(start, stop)):
            target = grid_values[:, column] - block_slope[i] / inner[i, i]
            new = scales.round_column(target, column // width)
            if keep_mask is not None:
                new = torch.where(keep_mask[:, column], new, 0.0)
            steps[i] = new - grid_values[:, column]
            grid_values[:, column] = new
            block_slope[i + 1 :].addr_(inner[i, i + 1 :], steps[i])
        slope.addmm_(steps.T, input_gram[start:stop])
    return grid_values


def refit_scales_and_values(
    weight: Tensor, input_gram: Tensor, scales: Scales, grid_values: Tensor
) -> tuple[Scales, Tensor]:
    """Scales that are best for the outputs while the codes stay; as they were where that is no gain."""
    count, width = scales.scale.shape[1], weight.shape[1] // scales.scale.shape[1]
    steps = (grid_values.unflatten(1, (count, width)) / scales.scale[:, :, None]).round()  # [out, groups, group]
    rows = max(1, SQUARES // count**2)
    parts = zip((weight @ input_gram).split(rows), steps.split(rows), strict=True)
    best = torch.cat([least_squares_scales_or_nan(input_gram, *part) for part in parts]).bfloat16().float()
    is_close = steps.any(2) & (best > 0.5 * scales.scale) & (best < 2 * scales.scale)  # and no NaN
    best = torch.where(is_close, best, scales.scale)
    candidate = (steps * best[:, :, None]).flatten(1)
    gains = _output_error(weight, input_gram, candidate) < _output_error(weight, input_gram, grid_values)  # [out]
    scale = torch.where(gains[:, None], best, scales.scale)
    return Scales(scales.max_code, scale, scales.zero), torch.where(gains[:, None], candidate, grid_values)


def least_squares_scales_or_nan(input_gram: Tensor, weight_times_gram: Tensor, centered_codes: Tensor) -> Tensor:
    """The scales [out, groups] that lose least for steps C = code - zero [out, groups, group]; NaN where none do.

    The squared error of an output is a square in its scales: A s = b with A the sums of C H C^T over pairs of groups
    and b those of C times `weight_times_gram`, W H [out, in]. Not by linalg.solve: MKL's LU of many matrices of 150
    rows and more fails or hangs with several threads.
    """
    count, width = centered_codes.shape[1:]
    pairs = input_gram.new_empty(len(centered_codes), count, count)
    for g in range(count):
        products = centered_codes[:, g] @ input_gram[g * width : (g + 1) * width]  # [out, in]
        pairs[:, g] = (products.unflatten(1, (count, width)) * centered_codes).sum(2)
    diagonal = pairs.diagonal(dim1=1, dim2=2)
    diagonal.add_(torch.where(centered_codes.any(2), 1e-6 * diagonal, 1.0))  # a group of zeros asks for nothing
    sums = (weight_times_gram.unflatten(1, (count, width)) * centered_codes).sum(2).double()[:, :, None]
    lower, failed = torch.linalg.cholesky_ex(pairs.double())
    solution = torch.linalg.solve_triangular(lower, sums, upper=False)
    solution = torch.linalg.solve_triangular(lower.mT, solution, upper=True)[:, :, 0]
    return torch.where(failed[:, None] > 0, torch.nan, solution).float()


def _output_error(weight: Tensor, gram: Tensor, values: Tensor) -> Tensor:
    """The squared error of every output, [out]."""
    difference = values - weight
    return ((difference @ gram) * difference).sum(1)

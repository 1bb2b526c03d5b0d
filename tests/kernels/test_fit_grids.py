"""Scales of grids by the compiled kernel: those of the search in torch, at every level and for any shape."""

import pytest
import torch
from effc.kernels import levels
from effc.kernels.grid import Grid, Scales
from effc.kernels.native import KernelError
from effc.kernels.sequences import call_kernel_at_active_level
from hypothesis import given, settings
from hypothesis import strategies as st


def error(weight: torch.Tensor, scales: Scales, squares: torch.Tensor | None) -> torch.Tensor:
    """Summed squared error of each group [out, groups]."""
    off = (scales.round(weight) - weight).square() * (1 if squares is None else squares)
    return off.reshape(*scales.scale.shape, -1).double().sum(2)


def by_torch(grid: Grid, weight: torch.Tensor, squares: torch.Tensor | None) -> Scales:
    groups = weight.reshape(len(weight), -1, grid.width(weight.shape[1]))
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    worth = None if squares is None else squares.reshape(groups.shape[1:])
    return Scales(grid.max_code, *grid._search_scales(groups, low, high, worth))


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    outputs=st.integers(1, 40),
    shape=st.sampled_from([(1, 0), (7, 0), (32, 16), (64, 32), (192, 64), (130, 65)]),
    weighed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_kernel_fits_grids_as_well_as_torch(bits, symmetric, outputs, shape, weighed, seed):
    inputs, group = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) * torch.rand(outputs, 1, generator=generator) ** 4
    weight[0] = 0  # an empty range
    weight[-1] = weight[-1].abs()  # a range on one side
    squares = torch.rand(inputs, generator=generator) if weighed else None
    grid = Grid(bits, group, symmetric, True)
    ours, torchs = grid.fit_scales(weight, squares), by_torch(grid, weight, squares)
    assert (error(weight, ours, squares) <= error(weight, torchs, squares) * (1 + 1e-5)).all()
    different = (ours.scale != torchs.scale) | (ours.zero != torchs.zero)  # where two grids have the same error
    assert different.float().mean() < 0.1


def test_every_level_fits_the_grids_of_the_portable_one(level):
    weight = torch.randn(37, 192, generator=torch.Generator().manual_seed(0))
    squares = torch.rand(192, generator=torch.Generator().manual_seed(1))
    grid = Grid(4, 64, False, True)
    fitted = grid.fit_scales(weight, squares)
    with levels.at_forced_level("portable"):
        portable = grid.fit_scales(weight, squares)
    assert torch.equal(fitted.scale, portable.scale) and torch.equal(fitted.zero, portable.zero)


def test_more_threads_and_other_rows_change_no_grid():
    weight = torch.randn(70, 128, generator=torch.Generator().manual_seed(0))
    grid, before = Grid(4, 32, True, True), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([grid.fit_scales(row[None]).scale for row in weight])
        torch.set_num_threads(3)
        assert torch.equal(grid.fit_scales(weight).scale, alone)
        assert torch.equal(grid.fit_scales(weight.T.contiguous().T).scale, alone), "columns that lie side by side"
    finally:
        torch.set_num_threads(before)


def test_counts_of_no_weight_are_refused():
    x = torch.ones(1)
    pointers = [t.data_ptr() for t in (x, x, x, x, x)]
    for counts in ((0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0)):
        with pytest.raises(KernelError):
            call_kernel_at_active_level("fit_grids", *pointers, *counts, 15.0, False, 1)

"""Codes that are found again in weights: exactly those of the grid that the weights are on."""

import pytest
import torch
from effc.kernels.codes import codes_if_on_grid
from effc.kernels.grid import Grid
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16)


def on_grid(bits, group, symmetric, search, dtype, seed, n=5, k=64):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05
    weight[0] = 0
    weight[1] = weight[1].abs()
    return Grid(bits, group, symmetric, search).fit_scales(weight).round(weight).to(dtype)


def values(codes, k, dtype):
    steps = codes.code.view(len(codes.code), codes.scale.shape[1], -1) - codes.zero[:, :, None]
    return (steps * codes.scale[:, :, None]).flatten(1)[:, :k].to(dtype)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([0, 4, 32]),
    symmetric=st.booleans(),
    search=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_the_codes_of_a_grid_give_its_weights_again_bit_for_bit(bits, group, symmetric, search, dtype, seed):
    weight = on_grid(bits, group, symmetric, search, dtype, seed)
    stored = 4 if bits <= 4 else 8
    codes = codes_if_on_grid(weight, group, stored, symmetric)
    assert codes is not None
    assert torch.equal(values(codes, 64, dtype), weight)
    assert int(codes.code.max()) < 2**stored
    assert torch.equal(codes.scale.bfloat16().float(), codes.scale)
    if symmetric:
        assert (codes.zero == 2 ** (stored - 1)).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_as_training_leaves_them_are_on_no_grid(bits, dtype):
    weight = (torch.randn(96, 64, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    assert codes_if_on_grid(weight, 32, bits) is None


def test_one_weight_off_the_grid_is_seen_wherever_it_is():
    weight = on_grid(8, 32, True, False, torch.float32, 0, n=80)
    for row, column in ((0, 0), (79, 63)):
        changed = weight.clone()
        changed[row, column] += 1e-4
        assert codes_if_on_grid(changed, 32, 8, True) is None


def test_a_symmetric_grid_is_not_taken_for_one_whose_zero_lies_elsewhere():
    weight = torch.zeros(1, 32)
    weight[0, :2] = torch.tensor([4.0, 3.0])  # multiples of 8 and 6 of half the scale, with the zero at 7
    codes = codes_if_on_grid(weight, 32, 4, symmetric=True)
    assert codes is not None and codes.zero.item() == 8 and torch.equal(values(codes, 32, torch.float32), weight)

"""dense_linear_int4: the grid that a weight is on is kept, and a row's result depends on nothing beside it."""

import pytest
import torch
from effc.kernels import codes, packed
from effc.kernels.grid import Grid
from effc.kernels.native import KernelError
from effc.kernels.ops import KERNELS
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.layers import run, weight

INT4 = KERNELS["dense_linear_int4"]


@settings(max_examples=25, deadline=None)
@given(
    group=st.sampled_from(codes.GROUPS),
    asked=st.sampled_from(codes.GROUPS),
    symmetric=st.booleans(),
    search=st.booleans(),
    half=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_weight_that_is_on_a_grid_keeps_every_value(group, asked, symmetric, search, half, seed):
    w = weight(19, 256, 1.0, seed) * 0.03
    w[:, :group] = w[:, :group].abs()
    w = Grid(4, group, symmetric, search).fit_scales(w).round(w)
    found = INT4.unpack(INT4.pack(w.bfloat16() if half else w, group_size=asked))
    # bfloat16 holds scale * code to 2**-9, the kernel exactly.
    assert torch.equal(found.bfloat16(), w.bfloat16()) if half else torch.equal(found, w)


def test_a_grid_of_zeros_in_the_middle_stores_none():
    w = weight(32, 128, 1.0)
    middle, free = (INT4.pack(Grid(4, 64, symmetric, True).fit_scales(w).round(w)) for symmetric in (True, False))
    assert free.numel() - middle.numel() == 128  # 2 blocks of 2 groups: 32 bytes, to a multiple of 64 each
    assert packed.packed_facts(middle).group == packed.packed_facts(free).group == 64


@pytest.mark.parametrize(("group", "bits"), [(32, 4.625), (64, 4.3125), (128, 4.15625)])
def test_a_weight_takes_four_bits_a_scale_and_a_zero(group, bits):
    w = weight(512, 2048, 1.0)
    assert INT4.pack(w, group_size=group).numel() * 8 / w.numel() == pytest.approx(bits, rel=2e-3)


def test_what_is_on_no_grid_goes_to_the_nearest_values_of_a_searched_one():
    w = weight(40, 192, 1.0)
    wanted = Grid(4, 64, False, True).fit_scales(w).round(w)
    assert torch.equal(INT4.unpack(INT4.pack(w)), wanted)


@pytest.mark.parametrize("group", codes.GROUPS)
def test_a_row_gives_the_same_bits_among_any_others(group, level):
    own = INT4.pack(weight(50, 300, 1.0), group_size=group)
    x = torch.randn(80, 300, generator=torch.Generator().manual_seed(1))
    tiles = level.startswith("amx")  # 16 rows and more meet tiles of bfloat16 there, fewer int8
    for many, counts in ((15 if tiles else 80, (1, 2, 4, 7, 15)), (80, (16, 31, 32, 33, 64))):
        whole = run("dense_linear_int4", x[:many], own, None, 50)
        for rows in counts:
            assert torch.equal(run("dense_linear_int4", x[:rows], own, None, 50), whole[:rows]), rows


def test_on_tiles_many_rows_are_as_near_to_the_exact_product_as_few(level):
    w, x = weight(64, 512, 1.0), torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    own = INT4.pack(w, group_size=32)
    exact = x.double() @ INT4.unpack(own).double().T
    few = torch.cat([run("dense_linear_int4", part, own, None, 64) for part in x.split(8)])
    many = run("dense_linear_int4", x, own, None, 64)
    assert float((many - exact).norm()) <= 1.01 * float((few - exact).norm())


def test_large_inputs_of_one_group_do_not_blur_the_others():
    w, x = weight(64, 256, 1.0), torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    x[:, 5] *= 1000
    own = INT4.pack(w, group_size=32)
    small = x.clone()
    small[:, :32] = 0
    whole, alone = run("dense_linear_int4", x, own, None, 64), run("dense_linear_int4", small, own, None, 64)
    large = run("dense_linear_int4", x - small, own, None, 64)
    assert torch.allclose(whole - large, alone, atol=1e-3 * float(whole.abs().max()) / 100)


def test_groups_that_no_kernel_has_are_refused():
    with pytest.raises(KernelError, match="groups of 48 inputs can't be packed; 32, 64, 128 can"):
        INT4.pack(weight(4, 96, 1.0), group_size=48)

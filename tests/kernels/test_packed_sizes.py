"""Sizes of packed weights from shapes are those of what is packed."""

import pytest
import torch
from effc.kernels.native import LINEAR
from effc.kernels.ops import LINEARS
from effc.kernels.packed_sizes import packed_weight_bytes

SHAPES = [(128, 128), (64, 96), (100, 130), (17, 385), (384, 33), (2048, 128)]


def weight(n, k, zeros, vectors):
    generator = torch.Generator().manual_seed(n + k)
    dense = torch.randn(n, k, generator=generator)
    if not vectors:
        return torch.where(torch.rand(n, k, generator=generator) < zeros, 0.0, dense)
    gone = torch.rand(-(-n // 16), -(-k // 2), generator=generator) < zeros
    return torch.where(gone.repeat_interleave(16, 0)[:n].repeat_interleave(2, 1)[:, :k], 0.0, dense)


@pytest.mark.parametrize("kernel", LINEAR)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_size_of_a_packed_weight_follows_from_its_shape_and_its_zeros(kernel, shape):
    packed = LINEARS[kernel].pack(weight(*shape, 0.0, False)).numel()
    assert packed_weight_bytes(kernel, *shape) == pytest.approx(
        packed, rel=0.02 if kernel == "sparse_linear_int8" else 0.0
    )


@pytest.mark.parametrize("kernel", [name for name in LINEAR if "sparse" in name])
@pytest.mark.parametrize("zeros", [0.5, 0.75])
def test_zeros_are_left_out_of_the_sizes_of_sparse_kernels(kernel, zeros):
    n, k, block = 512, 512, "block" in kernel
    packed = LINEARS[kernel].pack(weight(n, k, zeros, block)).numel()
    assert packed_weight_bytes(kernel, n, k, zeros) == pytest.approx(packed, rel=0.03)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("middle", [False, True])
def test_int4_has_a_scale_and_a_zero_for_each_group(group, middle):
    from effc.kernels.grid import Grid

    generator = torch.Generator().manual_seed(0)
    w = torch.randn(96, 384, generator=generator)
    w = Grid(4, group, middle, False).fit_scales(w).round(w)
    packed = LINEARS["dense_linear_int4"].pack(w, group_size=group)
    assert (
        packed_weight_bytes("dense_linear_int4", 96, 384, group_size=group, has_zero_codes=not middle) == packed.numel()
    )

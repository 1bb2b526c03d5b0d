"""Weights, inputs and tolerances that tests of linear kernels share."""

import torch
from effc.kernels import levels, native
from effc.kernels.ops import KERNELS

LINEAR = [name for name in KERNELS if name in native.LINEAR]


def weight(n: int, k: int, density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(n, k, generator=generator) < density
    return torch.randn(n, k, generator=generator) * kept


def run(kernel: str, x, packed, bias, n: int):
    return getattr(torch.ops.effc, kernel)(x, packed, bias, n)


def reference(kernel: str, x: torch.Tensor, packed: torch.Tensor, bias, n: int) -> torch.Tensor:
    """The kernel's reference, or for 16 rows or more of int4 on AMX the product of bfloat16 numbers, in float64."""
    own = KERNELS[kernel]
    if kernel != "dense_linear_int4" or not levels.active_level().startswith("amx") or len(x) < 16:
        return own.reference(x, packed, bias, n)
    product = x.bfloat16().double() @ own.unpack(packed).bfloat16().double().T
    return (product + (0 if bias is None else bias.double())).to(x.dtype)


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """float32 sums in another order: 1e-5 of the largest value; a bfloat16 result rounds by 2**-8 more."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    if not found.numel():
        return
    most = float(wanted.float().abs().max()) + 1e-6
    bound = most * (1e-5 if found.dtype == torch.float32 else 2**-8)
    assert float((found.float() - wanted.float()).abs().max()) <= bound

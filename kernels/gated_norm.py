"""The norm behind a scan: root mean square of groups of channels, after a gate."""

import torch
from torch.nn import functional

from .kernel import Kernel
from .native import KernelError
from .sequences import (
    FLOATS,
    as_float32,
    call_kernel_at_active_level,
    check_shape,
    data_pointer,
    fake_like_x,
    pointer_and_stride,
    with_common_dtype,
    with_contiguous_rows,
)


class GatedNorm(Kernel):
    """x, gate [m, g * w], weight [g * w], g groups -> weight * u / rms(u), u = x * silu(gate) or, ungated, x."""

    name = "gated_norm"
    schema = "(Tensor x, Tensor? gate, Tensor weight, float eps, int groups) -> Tensor"

    fake = staticmethod(fake_like_x)

    @staticmethod
    def reference(x, gate, weight, eps, groups) -> torch.Tensor:
        u = x.float() if gate is None else x.float() * functional.silu(gate.float())
        parts = u.unflatten(-1, (groups, -1))
        parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
        return (weight.float() * parts.flatten(-2)).to(x.dtype)

    @classmethod
    def native(cls, x, gate, weight, eps, groups) -> torch.Tensor:
        m, width = x.shape
        check_shape("a gate", gate, m, width)
        check_shape("a weight", weight, width)
        if groups < 1 or width % groups or x.dtype not in FLOATS:
            raise KernelError(f"{width} channels of {x.dtype} do not divide into {groups} groups of floats")
        x_rows, beside = with_common_dtype(x, gate)
        assert x_rows is not None, "no x"
        x_rows, gate, weight = (
            with_contiguous_rows(x_rows),
            None if beside is None else with_contiguous_rows(beside),
            as_float32(weight),
        )
        y = torch.empty(m, width, dtype=x_rows.dtype)
        operands, sizes = (
            (*pointer_and_stride(x_rows), *pointer_and_stride(gate), data_pointer(weight), data_pointer(y)),
            (m, groups, width // groups),
        )
        call_kernel_at_active_level(
            cls.name, *operands, *sizes, eps, x_rows.dtype is torch.float32, torch.get_num_threads()
        )
        return y.to(x.dtype)

    @staticmethod
    def unsupported_reason(width: int, groups: int) -> str:
        return f"{width} channels are not a multiple of {groups} groups" if width % groups else ""

    @staticmethod
    def cases() -> list[tuple[int, int, int]]:
        """Rows, groups, channels of a group."""
        return [(1, 1, 1), (3, 1, 17), (40, 2, 64), (5, 4, 33), (17, 1, 256)]

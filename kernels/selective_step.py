"""The selective scan of Mamba-1 for one position, its state moved on in place."""

import torch

from .kernel import Kernel
from .selective_scan import SelectiveScan
from .sequences import (
    as_float32,
    call_kernel_at_active_level,
    check_shape,
    data_pointer,
    fake_like_state,
    pointer_and_stride,
    with_common_dtype,
    with_contiguous_rows,
)


class SelectiveStep(Kernel):
    """As `selective_scan` with x, dt, z [b, c], B, C [b, n], state [b, c, n] -> y [b, c]; state is written.

    a_is_log   `a` is log(-A), as checkpoints hold it
    """

    name = "selective_step"
    schema = (
        "(Tensor(a!) state, Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? z, "
        "Tensor? bias, bool softplus, bool a_is_log) -> Tensor"
    )

    fake = staticmethod(fake_like_state)

    @staticmethod
    def reference(state, x, dt, a, b, c, d, z, bias, softplus, a_is_log) -> torch.Tensor:
        x, dt, b, c, z = (None if t is None else t[:, :, None] for t in (x, dt, b, c, z))
        a = -torch.exp(a.float()) if a_is_log else a
        y, h = SelectiveScan.reference(x, dt, a, b, c, d, z, bias, softplus, state, None)
        state.copy_(h)
        return y[:, :, 0]

    @classmethod
    def native(cls, state, x, dt, a, b, c, d, z, bias, softplus, a_is_log) -> torch.Tensor:
        (batches, channels), n = x.shape, a.shape[-1]
        check_shape("a state", state, batches, channels, n)
        check_shape("a time step", dt, batches, channels)
        check_shape("B", b, batches, n)
        check_shape("C", c, batches, n)
        check_shape("a gate", z, batches, channels)
        check_shape("A", a, channels, n)
        check_shape("D", d, channels)
        check_shape("the time step's bias", bias, channels)
        x_rows, dt, b, c, z = with_common_dtype(x, dt, b, c, z)
        x_rows, dt, b, c, z = (None if t is None else with_contiguous_rows(t) for t in (x_rows, dt, b, c, z))
        h = as_float32(state)
        a, d, bias, y = (
            as_float32(a),
            as_float32(d),
            as_float32(bias),
            torch.empty(batches, channels, dtype=x_rows.dtype),
        )
        operands = (
            *pointer_and_stride(x_rows),
            *pointer_and_stride(dt),
            *pointer_and_stride(z),
            *pointer_and_stride(b),
            *pointer_and_stride(c),
        )
        pointers, is_float = map(data_pointer, (a, d, bias, y, h)), x_rows.dtype is torch.float32
        call_kernel_at_active_level(
            cls.name, *operands, *pointers, batches, channels, n, is_float, softplus, a_is_log, torch.get_num_threads()
        )
        if h is not state:
            state.copy_(h)
        return y.to(x.dtype)

    unsupported_reason = SelectiveScan.unsupported_reason
    cases = SelectiveScan.cases

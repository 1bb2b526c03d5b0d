"""The scan of Mamba-2 for one position, its state moved on in place."""

import torch

from .kernel import Kernel
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
from .ssd_scan import SsdScan


class SsdStep(Kernel):
    """As `ssd_scan` with x [b, h, p], dt [b, h], B, C [b, g, n], state [b, h, p, n] -> y as x; state is written.

    a_is_log   `a` is log(-A), as checkpoints hold it
    """

    name = "ssd_step"
    schema = (
        "(Tensor(a!) state, Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? d, "
        "Tensor? bias, bool softplus, bool a_is_log) -> Tensor"
    )

    fake = staticmethod(fake_like_state)

    @staticmethod
    def reference(state, x, dt, a, b, c, d, bias, softplus, a_is_log) -> torch.Tensor:
        a = -torch.exp(a.float()) if a_is_log else a
        x, dt, b, c = (t[:, None] for t in (x, dt, b, c))
        y, h = SsdScan.reference(x, dt, a, b, c, d, bias, softplus, -torch.inf, torch.inf, state, None)
        state.copy_(h)
        return y[:, 0]

    @classmethod
    def native(cls, state, x, dt, a, b, c, d, bias, softplus, a_is_log) -> torch.Tensor:
        batches, heads, p = x.shape
        groups, n = b.shape[1:]
        check_shape("a state", state, batches, heads, p, n)
        check_shape("a time step", dt, batches, heads)
        check_shape("C", c, batches, groups, n)
        check_shape("A", a, heads)
        check_shape("D", d, heads)
        check_shape("the time step's bias", bias, heads)
        x_rows, dt, b, c = with_common_dtype(x, dt, b, c)
        x_rows, dt, b, c = (with_contiguous_rows(t.flatten(1)) for t in (x_rows, dt, b, c))
        h = as_float32(state)
        a, d, bias, y = (
            as_float32(a),
            as_float32(d),
            as_float32(bias),
            torch.empty(batches, heads, p, dtype=x_rows.dtype),
        )
        operands = *pointer_and_stride(x_rows), *pointer_and_stride(dt), *pointer_and_stride(b), *pointer_and_stride(c)
        pointers, sizes = map(data_pointer, (a, d, bias, y, h)), (batches, heads, p, groups, n)
        is_float = x_rows.dtype is torch.float32
        call_kernel_at_active_level(
            cls.name, *operands, *pointers, *sizes, is_float, softplus, a_is_log, torch.get_num_threads()
        )
        if h is not state:
            state.copy_(h)
        return y.to(x.dtype)

    unsupported_reason = SsdScan.unsupported_reason
    cases = SsdScan.cases

"""The causal convolution for one more position, its state moved on in place."""

import torch

from .causal_conv import CausalConv
from .kernel import Kernel
from .sequences import (
    as_float32,
    call_kernel_at_active_level,
    check_shape,
    data_pointer,
    fake_like_x,
    pointer_and_stride,
    with_contiguous_rows,
)


class CausalConvStep(Kernel):
    """x [b, c], state [b, c, s >= k - 1] of inputs before, weight [c, k] -> y [b, c]; state ends with x."""

    name = "causal_conv_step"
    schema = "(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, bool silu) -> Tensor"

    fake = staticmethod(fake_like_x)

    @staticmethod
    def reference(x, state, weight, bias, silu) -> torch.Tensor:
        window = torch.cat([state, x[:, :, None].to(state.dtype)], 2)
        y = (window[:, :, -weight.shape[1] :].float() * weight.float()).sum(2)
        y = y if bias is None else y + bias.float()
        state.copy_(window[:, :, 1:])
        return (torch.nn.functional.silu(y) if silu else y).to(x.dtype)

    @classmethod
    def native(cls, x, state, weight, bias, silu) -> torch.Tensor:
        b, c = x.shape
        s, k = state.shape[-1], weight.shape[-1]
        check_shape("a state", state, b, c, s)
        check_shape("a weight", weight, c, k)
        check_shape("a bias", bias, c)
        if s < k - 1 or state.dtype is not x.dtype or not state.is_contiguous() or x.dtype is torch.float64:
            return cls.reference(x, state, weight, bias, silu)
        x, weight, bias, y = (
            with_contiguous_rows(x),
            as_float32(weight),
            as_float32(bias),
            torch.empty(b, c, dtype=x.dtype),
        )
        call_kernel_at_active_level(
            cls.name,
            *pointer_and_stride(x),
            *map(data_pointer, (state, weight, bias, y)),
            b,
            c,
            s,
            k,
            x.dtype is torch.float32,
            silu,
        )
        return y

    unsupported_reason = CausalConv.unsupported_reason
    cases = CausalConv.cases

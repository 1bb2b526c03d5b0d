"""A filter per channel along the sequence, each position summed with those before it."""

import torch
from torch import Tensor
from torch.nn import functional

from .kernel import Kernel
from .sequences import (
    FLOATS,
    as_float32,
    call_kernel_at_active_level,
    check_shape,
    checked_live_ranges,
    data_pointer,
    live_mask,
    pointer_and_strides,
    with_common_dtype,
    with_contiguous_rows,
)


class CausalConv(Kernel):
    """x [b, c, t], weight [c, k], bias [c] or None -> y as x, each position summed with k - 1 before it.

    before   [b, c, k - 1]: what came before the first live position; zeros where None
    bounds   [b, 2] int64: first live position and the one behind the last; outside them y is 0
    silu     whether the sum goes through silu
    x may lie in any order; y lies as [b, t, c], in which projections read it.
    """

    name = "causal_conv"
    schema = "(Tensor x, Tensor weight, Tensor? bias, Tensor? before, Tensor? bounds, bool silu) -> Tensor"

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, bounds, silu = inputs
        ctx.save_for_backward(*tensors)
        ctx.options = bounds, silu

    @staticmethod
    def fake(x, weight, bias, initial_state, live_ranges, silu) -> Tensor:
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1]).mT

    @staticmethod
    def reference(x, weight, bias, initial_state, live_ranges, silu) -> Tensor:
        b, c, t = x.shape
        k, wide = weight.shape[1], x.dtype if x.dtype is torch.float64 else torch.float32
        mask = live_mask(live_ranges, b, t).to(x.device)
        inputs = functional.pad((x * mask[:, None]).to(wide), (k - 1, 0))
        if initial_state is not None and k > 1:
            first = torch.zeros(b, dtype=torch.int64) if live_ranges is None else live_ranges[:, 0]
            positions = (first[:, None] + torch.arange(k - 1))[:, None].expand(-1, c, -1)
            inputs = inputs.scatter_add(2, positions, initial_state.to(wide))
        bias = None if bias is None else bias.to(wide)
        y = functional.conv1d(inputs, weight.to(wide)[:, None], bias, groups=c)
        return ((functional.silu(y) if silu else y) * mask[:, None]).to(x.dtype)

    @staticmethod
    def native(x, weight, bias, initial_state, live_ranges, silu) -> Tensor:
        b, c, t = x.shape
        k = weight.shape[-1]
        check_shape("a weight", weight, c, k)
        check_shape("a bias", bias, c)
        check_shape("what came before", initial_state, b, c, k - 1)
        live_ranges = checked_live_ranges(live_ranges, b, t)
        (x_rows,) = with_common_dtype(x)
        x_rows = with_contiguous_rows(x_rows.mT)  # [b, t, c]
        y = torch.empty(b, t, c, dtype=x_rows.dtype)
        filters, bias = as_float32(weight.mT), as_float32(bias)  # [k, c]
        initial_state = None if initial_state is None or k == 1 else initial_state.mT.to(x_rows.dtype).contiguous()
        pointers = map(data_pointer, (filters, bias, initial_state, y, live_ranges))
        is_float = x_rows.dtype is torch.float32
        call_kernel_at_active_level(
            "causal_conv", *pointer_and_strides(x_rows), *pointers, b, t, c, k, is_float, silu, torch.get_num_threads()
        )
        return y.mT.to(x.dtype)

    @classmethod
    def backward(cls, ctx, grad) -> tuple[Tensor | None, ...]:
        tensors, (bounds, silu) = ctx.saved_tensors, ctx.options
        with torch.enable_grad():
            leaves = x, weight, bias, before = [None if t is None else t.detach().requires_grad_() for t in tensors]
            y = cls.reference(x, weight, bias, before, bounds, silu)
            needs = ctx.needs_input_grad
            differentiable = [x for x, need in zip(leaves, needs, strict=False) if x is not None and need]
            grads = iter(torch.autograd.grad(y, differentiable, grad))
        return (
            *(next(grads) if x is not None and need else None for x, need in zip(leaves, needs, strict=False)),
            None,
            None,
        )

    @staticmethod
    def unsupported_reason(weight: Tensor, activation: str | None = None) -> str:
        if weight.dim() != 2:
            return f"its filters are {weight.dim() - 1}-dimensional"
        if weight.dtype not in FLOATS:
            return f"its filters are {weight.dtype}"
        return "" if activation in (None, "silu", "swish") else f"its activation is {activation}"

    @staticmethod
    def cases() -> list[tuple[int, int, int, int]]:
        """Sequences, channels, positions, width of the filter."""
        return [(1, 1, 1, 1), (2, 16, 5, 4), (1, 17, 33, 4), (3, 40, 70, 3), (2, 130, 2, 5), (1, 64, 1, 4)]

"""The scan of Mamba-2 (state-space duality)."""

import torch
from torch.nn import functional

from .kernel import Kernel
from .selective_scan import setup_context
from .sequences import (
    as_float32,
    call_kernel_at_active_level,
    check_shape,
    checked_live_ranges,
    data_pointer,
    fake_like_x,
    live_mask,
    pointer_and_strides,
    with_common_dtype,
    with_contiguous_rows,
)


def backward(ctx, grad, grad_state) -> tuple:
    saved = ctx.saved_tensors
    x, dt, a, b, c, d, bias, state, bounds = saved
    batches, length, heads, p = x.shape
    groups, n = b.shape[2:]
    grad = torch.zeros(x.shape) if grad is None else grad
    inputs = [as_float32(t) for t in (x, grad, dt, b, c, a, d, bias, state, grad_state)]
    of_x, of_dt = torch.zeros(x.shape), torch.zeros(dt.shape)
    of_b, of_c = (torch.zeros(batches, length, heads, n) for _ in range(2))
    of_state = torch.zeros(batches, heads, p, n)
    of_a, of_d, of_bias = (torch.zeros(batches, heads) for _ in range(3))
    outputs = (of_x, of_dt, of_b, of_c, of_state, of_a, of_d, of_bias)
    softplus, least, upper = ctx.options
    pointers = (
        *map(data_pointer, inputs),
        *map(data_pointer, outputs),
        data_pointer(checked_live_ranges(bounds, batches, length)),
    )
    sizes = batches, length, heads, p, groups, n
    call_kernel_at_active_level("ssd_scan_backward", *pointers, *sizes, least, upper, softplus, torch.get_num_threads())
    of_b, of_c = (t.unflatten(2, (groups, -1)).sum(3) for t in (of_b, of_c))
    grads = (of_x, of_dt, of_a.sum(0), of_b, of_c, of_d.sum(0), of_bias.sum(0), of_state)
    *before, last = (None if t is None else g.to(t.dtype) for t, g in zip(saved[:8], grads, strict=True))
    return *before, None, None, None, last, None


class SsdScan(Kernel):
    """h = exp(dt A) h + dt x (x) B and y = h . C + D x, position by position; returns y and the last h.

    x          [b, t, h, p]                     dt            [b, t, h]
    a          [h]                              d, bias       [h] or None; bias is added to dt
    B, C       [b, t, g, n], g divides h        least, most   bounds of dt
    softplus   whether dt goes through it then  state         [b, h, p, n]: h before; zeros where None
    bounds     [b, 2] int64: first live position and the one behind the last; outside them y is 0, h stands
    h is float32. float32 and bfloat16.
    """

    name = "ssd_scan"
    schema = (
        "(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? bias, bool softplus, "
        "float least, float most, Tensor? state, Tensor? bounds) -> (Tensor, Tensor)"
    )

    setup_context, backward = staticmethod(setup_context), staticmethod(backward)

    @staticmethod
    def fake(
        x, dt, a, b, c, d, bias, softplus, min_dt, max_dt, state, live_ranges
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = x.shape[0], *x.shape[2:], b.shape[3]
        return fake_like_x(x), x.new_empty(shape, dtype=torch.float32)

    @staticmethod
    def reference(
        x, dt, a, b, c, d, bias, softplus, min_dt, max_dt, state, live_ranges
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        wide_x, dt, a, b, c = (t.to(wide) for t in (x, dt, a, b, c))
        b, c = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (b, c))
        dt = dt if bias is None else dt + bias.to(wide)
        dt = (functional.softplus(dt) if softplus else dt).clamp(min_dt, max_dt)
        mask = live_mask(live_ranges, *x.shape[:2])
        shape = x.shape[0], *x.shape[2:], b.shape[3]
        h = torch.zeros(shape, dtype=wide) if state is None else state.to(wide)
        steps = []
        for t in range(x.shape[1]):
            decay = torch.exp(dt[:, t] * a)[..., None, None]
            drive = (dt[:, t, :, None] * wide_x[:, t])[..., None]
            h = torch.where(mask[:, t, None, None, None], decay * h + drive * b[:, t, :, None], h)
            steps.append((h * c[:, t, :, None]).sum(3))
        y = torch.stack(steps, 1) if steps else wide_x
        y = y if d is None else y + d.to(wide)[:, None] * wide_x
        return torch.where(mask[:, :, None, None], y, 0.0).to(x.dtype), h

    @classmethod
    def native(
        cls, x, dt, a, b, c, d, bias, softplus, min_dt, max_dt, state, live_ranges
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batches, length, heads, p = x.shape
        groups, n = b.shape[2:]
        _refuse_mismatched_shapes(x, dt, a, b, c, d, bias, state)
        live_ranges = checked_live_ranges(live_ranges, batches, length)
        x_rows, dt, b, c = with_common_dtype(x, dt, b, c)
        x_rows, b, c = (flatten_heads(t) for t in (x_rows, b, c))  # [b, t, h * p] and [b, t, g * n]
        dt = with_contiguous_rows(dt)
        y = torch.empty(batches, length, heads, p, dtype=x_rows.dtype)
        h = torch.zeros(batches, heads, p, n) if state is None else state.float().contiguous().clone()
        a, d, bias = as_float32(a), as_float32(d), as_float32(bias)
        layouts = (
            *pointer_and_strides(x_rows),
            *pointer_and_strides(dt),
            *pointer_and_strides(b),
            *pointer_and_strides(c),
        )
        pointers, sizes = map(data_pointer, (a, d, bias, y, h, live_ranges)), (batches, length, heads, p, groups, n)
        is_float = x_rows.dtype is torch.float32
        call_kernel_at_active_level(
            cls.name, *layouts, *pointers, *sizes, min_dt, max_dt, is_float, softplus, torch.get_num_threads()
        )
        return y.to(x.dtype), h

    @staticmethod
    def unsupported_reason(heads: int, groups: int) -> str:
        return f"{heads} heads are not a multiple of {groups} groups" if heads % groups else ""

    @staticmethod
    def cases() -> list[tuple[int, int, int, int, int, int]]:
        """Sequences, heads, channels of a head, groups, states, positions."""
        return [
            (1, 1, 1, 1, 1, 1),
            (2, 4, 16, 2, 16, 5),
            (1, 6, 17, 3, 5, 33),
            (2, 3, 64, 1, 20, 70),
            (1, 2, 80, 1, 128, 130),
            (3, 4, 8, 4, 16, 1),
        ]


def flatten_heads(x: torch.Tensor) -> torch.Tensor:
    """[b, t, h, w] as [b, t, h * w], a copy only where that is no view with a contiguous last axis."""
    return with_contiguous_rows(x.flatten(2))


def _refuse_mismatched_shapes(x, dt, a, b, c, d, bias, state) -> None:
    batches, length, heads, p = x.shape
    groups, n = b.shape[2:]
    check_shape("a time step", dt, batches, length, heads)
    check_shape("A", a, heads)
    check_shape("B", b, batches, length, groups, n)
    check_shape("C", c, batches, length, groups, n)
    check_shape("D", d, heads)
    check_shape("the time step's bias", bias, heads)
    check_shape("a state", state, batches, heads, p, n)

"""The selective scan of Mamba-1."""

import torch
from torch import Tensor
from torch.nn import functional

from .kernel import Kernel
from .sequences import (
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


def setup_context(ctx, inputs, output) -> None:
    tensors = [x for x in inputs if x is None or isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.options = [x for x in inputs if not (x is None or isinstance(x, Tensor))]
    ctx.set_materialize_grads(False)


def backward(ctx, grad, grad_state) -> tuple:
    saved = ctx.saved_tensors
    x, dt, a, b, c, d, z, bias, state, bounds = saved
    (softplus,) = ctx.options
    batches, channels, length = x.shape
    n = a.shape[1]
    grad = torch.zeros(x.shape) if grad is None else grad
    # [b, t, c] and [b, t, n]
    wide = [None if t is None else t.mT.float().contiguous() for t in (x, dt, z, grad, b, c)]
    inputs = [as_float32(t) for t in (a, d, bias, state, grad_state)]
    of_x, of_dt, of_z = (torch.zeros(batches, length, channels) for _ in range(3))
    of_b, of_c = (torch.zeros(batches, -(-channels // 16), length, n) for _ in range(2))
    of_a, of_state = (torch.zeros(batches, channels, n) for _ in range(2))
    of_d, of_bias = (torch.zeros(batches, channels) for _ in range(2))
    outputs = (of_x, of_dt, of_z, of_b, of_c, of_a, of_state, of_d, of_bias)
    pointers = (
        *map(data_pointer, wide),
        *map(data_pointer, inputs),
        *map(data_pointer, outputs),
        data_pointer(checked_live_ranges(bounds, batches, length)),
    )
    call_kernel_at_active_level(
        "selective_scan_backward", *pointers, batches, length, channels, n, softplus, torch.get_num_threads()
    )
    last_axis_first = of_x.mT, of_dt.mT, of_a.sum(0), of_b.sum(1).mT, of_c.sum(1).mT
    grads = *last_axis_first, of_d.sum(0), of_z.mT, of_bias.sum(0), of_state
    x_, dt_, a_, b_, c_, d_, z_, bias_, state_ = (
        None if t is None else g.to(t.dtype) for t, g in zip(saved[:9], grads, strict=True)
    )
    return x_, dt_, a_, b_, c_, d_, z_, bias_, None, state_, None


class SelectiveScan(Kernel):
    """h = exp(dt A) h + dt x B and y = (C . h + D x) silu(z), position by position; returns y and the last h.

    x, dt, z   [b, c, t], z may be None           a        [c, n]
    B, C       [b, n, t]                          d, bias  [c] or None; bias is added to dt
    softplus   whether dt goes through it then    state    [b, c, n]: h before; zeros where None
    bounds     [b, 2] int64: first live position and the one behind the last; outside them y is 0, h stands
    Tensors may lie in any order; y lies as [b, t, c]. h is float32. float32 and bfloat16.
    """

    name = "selective_scan"
    schema = (
        "(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? z, Tensor? bias, "
        "bool softplus, Tensor? state, Tensor? bounds) -> (Tensor, Tensor)"
    )

    setup_context, backward = staticmethod(setup_context), staticmethod(backward)

    @staticmethod
    def fake(x, dt, a, b, c, d, z, bias, softplus, state, live_ranges) -> tuple[Tensor, Tensor]:
        return (
            x.new_empty(x.shape[0], x.shape[2], x.shape[1]).mT,
            x.new_empty(x.shape[0], *a.shape, dtype=torch.float32),
        )

    @staticmethod
    def reference(x, dt, a, b, c, d, z, bias, softplus, state, live_ranges) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        wide_x, dt, a, b, c = (t.to(wide) for t in (x, dt, a, b, c))
        dt = dt if bias is None else dt + bias.to(wide)[:, None]
        dt = functional.softplus(dt) if softplus else dt
        mask = live_mask(live_ranges, len(x), x.shape[2])
        h = torch.zeros(len(x), *a.shape, dtype=wide) if state is None else state.to(wide)
        steps = []
        for t in range(x.shape[2]):
            updated = torch.exp(dt[:, :, t, None] * a) * h + (dt * wide_x)[:, :, t, None] * b[:, None, :, t]
            h = torch.where(mask[:, t, None, None], updated, h)
            steps.append((h * c[:, None, :, t]).sum(2))
        y = torch.stack(steps, 2) if steps else wide_x
        y = y if d is None else y + d.to(wide)[:, None] * wide_x
        y = y if z is None else y * functional.silu(z.to(wide))
        return torch.where(mask[:, None], y, 0.0).to(x.dtype), h

    @classmethod
    def native(cls, x, dt, a, b, c, d, z, bias, softplus, state, live_ranges) -> tuple[Tensor, Tensor]:
        (batches, channels, length), n = x.shape, a.shape[-1]
        _refuse_mismatched_shapes(x, dt, a, b, c, d, z, bias, state)
        live_ranges = checked_live_ranges(live_ranges, batches, length)
        x_rows, dt, b, c, z = with_common_dtype(x, dt, b, c, z)
        x_rows, b, c, dt = (
            with_contiguous_rows(x_rows.mT),
            with_contiguous_rows(b.mT),
            with_contiguous_rows(c.mT),
            dt.mT,
        )  # [b, t, c] and [b, t, n]
        z = None if z is None else with_contiguous_rows(z.mT)
        y = torch.empty(batches, length, channels, dtype=x_rows.dtype)
        h = torch.zeros(batches, channels, n) if state is None else state.float().contiguous().clone()
        a, d, bias = as_float32(a), as_float32(d), as_float32(bias)
        layouts = (
            *pointer_and_strides(x_rows),
            *pointer_and_strides(dt),
            dt.stride(2),
            *pointer_and_strides(z),
            *pointer_and_strides(b),
            *pointer_and_strides(c),
        )
        pointers, sizes = map(data_pointer, (a, d, bias, y, h, live_ranges)), (batches, length, channels, n)
        is_float = x_rows.dtype is torch.float32
        call_kernel_at_active_level(cls.name, *layouts, *pointers, *sizes, is_float, softplus, torch.get_num_threads())
        return y.mT.to(x.dtype), h

    @staticmethod
    def unsupported_reason(num_states: int) -> str:
        return "" if 0 < num_states <= 4096 else f"a channel has {num_states} states"

    @staticmethod
    def cases() -> list[tuple[int, int, int, int]]:
        """Sequences, channels, states, positions."""
        return [(1, 1, 1, 1), (2, 16, 16, 5), (1, 17, 5, 33), (3, 40, 8, 70), (2, 33, 20, 130), (1, 32, 16, 1)]


def _refuse_mismatched_shapes(x, dt, a, b, c, d, z, bias, state) -> None:
    (batches, channels, length), n = x.shape, a.shape[-1]
    check_shape("a time step", dt, batches, channels, length)
    check_shape("A", a, channels, n)
    check_shape("B", b, batches, n, length)
    check_shape("C", c, batches, n, length)
    check_shape("D", d, channels)
    check_shape("a gate", z, batches, channels, length)
    check_shape("the time step's bias", bias, channels)
    check_shape("a state", state, batches, channels, n)

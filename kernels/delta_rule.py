"""The gated delta rule: a state that forgets, and learns what it does not yet hold of each position."""

import torch

from .kernel import Kernel
from .sequences import (
    as_float32,
    call_kernel_at_active_level,
    check_shape,
    data_pointer,
    pointer_and_strides,
    with_contiguous_rows,
)


class DeltaRule(Kernel):
    """S = exp(decay) S, S = S + k (x) beta (v - k . S) and y = q . S, position by position; returns y and the last S.

    q, k    [b, t, g, n], g divides h       beta    [b, t, h]
    v       [b, t, h, p]                    decay   [b, t, h], or [b, t, h, n] for each key channel
    state   [b, h, n, p]: S before; zeros where None
    float32.
    """

    name = "delta_rule"
    schema = "(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor beta, Tensor? state) -> (Tensor, Tensor)"

    @staticmethod
    def fake(q, k, v, decay, beta, state) -> tuple[torch.Tensor, torch.Tensor]:
        batches, _, heads, p = v.shape
        return torch.empty_like(v, memory_format=torch.contiguous_format), v.new_empty(batches, heads, k.shape[3], p)

    @staticmethod
    def reference(q, k, v, decay, beta, state) -> tuple[torch.Tensor, torch.Tensor]:
        batches, length, heads, p = v.shape
        q, k = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
        decay = decay[..., None] if decay.dim() == 3 else decay
        s = torch.zeros(batches, heads, k.shape[3], p, dtype=v.dtype) if state is None else state.clone()
        y = torch.zeros_like(v)
        for t in range(length):
            s = decay[:, t].exp()[..., None] * s
            known = (k[:, t, ..., None] * s).sum(2)
            s = s + k[:, t, ..., None] * (beta[:, t, :, None] * (v[:, t] - known))[:, :, None]
            y[:, t] = (q[:, t, ..., None] * s).sum(2)
        return y, s

    @classmethod
    def native(cls, q, k, v, decay, beta, state) -> tuple[torch.Tensor, torch.Tensor]:
        batches, length, heads, p = v.shape
        groups, n = k.shape[2:]
        check_shape("q", q, batches, length, groups, n)
        check_shape("a decay", decay, batches, length, heads, *([n] if decay.dim() == 4 else []))
        check_shape("beta", beta, batches, length, heads)
        check_shape("a state", state, batches, heads, n, p)
        by_channel = decay.dim() == 4
        operands = [with_contiguous_rows(x.float().flatten(2)) for x in (q, k, v, decay, beta)]
        s = torch.zeros(batches, heads, n, p) if state is None else as_float32(state).clone()
        y = torch.empty(batches, length, heads, p)
        sizes = batches, length, heads, groups, n, p
        layouts = (part for x in operands for part in pointer_and_strides(x))
        call_kernel_at_active_level(
            cls.name, *layouts, data_pointer(y), data_pointer(s), *sizes, by_channel, torch.get_num_threads()
        )
        return y.to(v.dtype), s

    @staticmethod
    def unsupported_reason(heads: int, groups: int) -> str:
        return f"{heads} heads are not a multiple of {groups} groups" if heads % groups else ""

    @staticmethod
    def cases() -> list[tuple[int, int, int, int, int, int, bool]]:
        """Sequences, heads, numbers of a value, groups, numbers of a key, positions, a decay for each of those."""
        return [
            (1, 1, 1, 1, 1, 1, False),
            (2, 4, 16, 2, 16, 5, True),
            (1, 6, 17, 3, 5, 33, False),
            (2, 3, 64, 1, 20, 70, True),
            (1, 2, 130, 2, 128, 30, False),
        ]

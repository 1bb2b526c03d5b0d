"""The library's functions for scans and convolutions along a sequence, over effc's kernels.

Each takes what transformers' function of that name takes, hands on to a kernel what that can do, and the rest
to the function itself. Gradients are registered with the kernels.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ....kernels.causal_conv import CausalConv
from ....kernels.causal_conv_step import CausalConvStep
from ....kernels.kernel import Kernel
from ....kernels.selective_scan import SelectiveScan
from ....kernels.selective_step import SelectiveStep
from ....kernels.sequences import FLOATS
from ....kernels.ssd_scan import SsdScan
from ....kernels.ssd_step import SsdStep
from . import leaves
from .cached_positions import count_positions

PACKED = ("seq_idx", "cu_seqlens", "cu_seq_lens_q")  # several sequences in one row are the library's matter
_SILU = ("silu", "swish")


class UnsupportedCall(Exception):
    """A call is none for a kernel."""


def wrap_with_kernel(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """The function over a kernel; what that can't take goes to the original."""
    over = QUICK[name]

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            if any(kwargs.get(word) is not None for word in PACKED):
                raise UnsupportedCall
            return over(*args, **kwargs)
        except UnsupportedCall:
            return original(*args, **kwargs)

    return call


def apply_kernel(kernel: type[Kernel], *arguments: Any) -> Any:
    """A kernel, recorded for gradients where any are wanted and understood by modes of torch."""
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    _require_kernel_support(all(x.device.type == "cpu" and x.dtype in FLOATS for x in tensors))
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if learns or any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors):
        return getattr(torch.ops.effc, kernel.name)(*arguments)
    return kernel.native(*arguments)


def _require_kernel_support(is_supported: bool) -> None:
    if not is_supported:
        raise UnsupportedCall


def _undo_head_expansion(x: Tensor | None) -> Tensor | None:
    """The number per head of a tensor that was expanded to channels and states."""
    if x is None:
        return None
    # D and dt_bias are [h, p], A is [h, p, n]: heads come first
    _require_kernel_support(all(step == 0 or size == 1 for step, size in zip(x.stride()[1:], x.shape[1:], strict=True)))
    first: tuple[Any, ...] = (..., *(0,) * (x.dim() - 1))
    return x[first]


def _convolution(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    _require_kernel_support(not CausalConv.unsupported_reason(weight, activation) and hidden_states.dim() == 3)
    return apply_kernel(CausalConv, hidden_states, weight, bias, None, None, activation in _SILU)


def _convolution_step(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    _require_kernel_support(not CausalConv.unsupported_reason(weight, activation) and hidden_states.shape[-1] == 1)
    _require_kernel_support(_need_no_gradient(hidden_states, conv_state, weight, bias))
    y = apply_kernel(CausalConvStep, hidden_states[:, :, 0], conv_state, weight, bias, activation in _SILU)
    return y[:, :, None]


def _selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Any:
    _require_kernel_support(
        A.dim() == 2 and B.dim() == C.dim() == 3 and not SelectiveScan.unsupported_reason(A.shape[-1])
    )
    y, state = apply_kernel(SelectiveScan, hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, None, None)
    return (y, state) if return_last_state else y


def _selective_step(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    **_: Any,
) -> Tensor:
    _require_kernel_support(A.dim() == 2 and B.dim() == C.dim() == 2)
    _require_kernel_support(_need_no_gradient(hidden_states, dt, A, B, C, D, z, dt_bias))
    return apply_kernel(SelectiveStep, state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus, False)


def _need_no_gradient(*tensors: Tensor | None) -> bool:
    """Steps write states and have no gradient."""
    return not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors))


def _chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    z: Tensor | None = None,
    **_: Any,
) -> Any:
    _require_kernel_support(z is None and A.dim() == 1 and (D is None or D.dim() == 1) and hidden_states.dim() == 4)
    _require_kernel_support(not SsdScan.unsupported_reason(hidden_states.shape[2], B.shape[2]))
    y, state = apply_kernel(
        SsdScan, hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, *map(float, dt_limit), initial_states, None
    )
    return (y, state) if return_final_states else y


def _ssd_step(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    **_: Any,
) -> Tensor:
    _require_kernel_support(z is None and hidden_states.dim() == B.dim() == 3 and A.dim() == 3 and dt.dim() == 3)
    _require_kernel_support(_need_no_gradient(hidden_states, dt, A, B, C, D, dt_bias))
    _require_kernel_support(dt.shape[2] == 1 or dt.stride(2) == 0)
    a, d, bias = map(_undo_head_expansion, (A, D, dt_bias))
    return apply_kernel(SsdStep, state, hidden_states, dt[:, :, 0], a, B, C, d, bias, dt_softplus, False)


QUICK: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolution,
    "causal_conv1d_update": _convolution_step,
    "mamba_selective_scan": _selective_scan,
    "mamba_selective_state_update": _selective_step,
    "mamba2_chunk_scan": _chunk_scan,
    "mamba2_selective_state_update": _ssd_step,
}


def causal_conv_leaf_on_kernel(
    cache: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, layer_idx: int
) -> Tensor:
    """`leaves.causal_conv` over the kernel."""
    length, k = x.shape[-1], weight.shape[-1]
    if CausalConv.unsupported_reason(weight, activation) or x.device.type != "cpu" or x.dtype not in FLOATS:
        return leaves.causal_conv(cache, x, weight, bias, activation, layer_idx)
    if length == 1 and cache is not None and not cache.is_recording_past(layer_idx):
        state = cache.get_conv_state(layer_idx)
        if state is not None and _need_no_gradient(x, weight, bias):
            count_positions(cache, layer_idx, 1)
            y = apply_kernel(CausalConvStep, x[:, :, 0], state, weight, bias, activation in _SILU)
            return y[:, :, None]
    inputs = x if cache is None else cache.update_conv_state(x, layer_idx, conv_kernel_size=k)
    return apply_kernel(CausalConv, inputs, weight, bias, None, None, activation in _SILU)[..., -length:].to(x.dtype)

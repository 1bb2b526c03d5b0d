"""Shared by kernels along a sequence: memory layout of arguments, and live positions."""

from typing import TypeVar

import torch
from torch import Tensor

from . import levels, native

FLOATS = (torch.float32, torch.bfloat16)


def call_kernel_at_active_level(name: str, *arguments) -> None:
    """Call a compiled kernel at the instruction set in use. Raises KernelError where it refuses its arguments."""
    status = native.library_function(name)(levels.active_level_code(), *arguments)
    if status:
        raise native.error_of_status(status, "the sequence")


def with_contiguous_rows(x: Tensor) -> Tensor:
    """x [..., width] as it is where its last axis is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def data_pointer(x: Tensor | None) -> int | None:
    """Address of a tensor's first number; None, a null pointer, without one."""
    return None if x is None else x.data_ptr()


def as_float32(x: Tensor | None) -> Tensor | None:
    """A parameter as compiled kernels read it: float32, contiguous."""
    if x is None or (x.dtype is torch.float32 and x.is_contiguous()):
        return x
    return x.float().contiguous()


OptionalTensor = TypeVar("OptionalTensor", Tensor, Tensor | None)


def with_common_dtype(*tensors: OptionalTensor) -> list[OptionalTensor]:
    """All as bfloat16 where all are, else as float32."""
    kinds = {x.dtype for x in tensors if x is not None}
    if kinds in ({torch.float32}, {torch.bfloat16}):
        return list(tensors)
    return [x if x is None else x.float() for x in tensors]


def checked_live_ranges(live_ranges: Tensor | None, batches: int, length: int) -> Tensor | None:
    """The first live position of every sequence, and the one behind its last: [batches, 2] int64, checked."""
    if live_ranges is None:
        return None
    if live_ranges.shape != (batches, 2) or live_ranges.dtype != torch.int64:
        description = f"{list(live_ranges.shape)} of {live_ranges.dtype}"
        raise native.KernelError(f"bounds {description} are not [{batches}, 2] of int64")
    first, last = live_ranges.unbind(1)
    if bool(((first < 0) | (last < first) | (last > length)).any()):
        raise native.KernelError(f"bounds leave a sequence of {length} positions, or end before they begin")
    return live_ranges.contiguous()


def live_mask(live_ranges: Tensor | None, batches: int, length: int) -> Tensor:
    """Mask of live positions, [batches, length] bool."""
    if live_ranges is None:
        return torch.ones(batches, length, dtype=torch.bool)
    position = torch.arange(length)
    return (position >= live_ranges[:, :1]) & (position < live_ranges[:, 1:])


def fake_like_x(x: Tensor, *_) -> Tensor:
    """Fake of a kernel whose result has the shape and dtype of its first operand, but is contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def fake_like_state(state: Tensor, x: Tensor, *_) -> Tensor:
    """Fake of a kernel whose first operand is a state, and whose result is like its second, x."""
    return fake_like_x(x)


def check_shape(label: str, x: Tensor | None, *expected_shape: int) -> None:
    """Raises KernelError where a tensor has another shape; None always fits."""
    if x is not None and x.shape != expected_shape:
        raise native.KernelError(f"{label} of shape {list(x.shape)} does not fit: {list(expected_shape)} is wanted")


def pointer_and_strides(x: Tensor | None) -> tuple:
    """Pointer of a tensor [b, t, w], and its strides over b and t."""
    return (None, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def pointer_and_stride(x: torch.Tensor | None) -> tuple:
    """Pointer of a tensor [b, ...], and its first stride."""
    return (None, 0) if x is None else (x.data_ptr(), x.stride(0))

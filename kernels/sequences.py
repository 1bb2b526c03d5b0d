"""Shared by kernels along a sequence: memory layout of arguments, and live positions."""

from typing import TypeVar

import torch
from torch import Tensor

from . import levels, native

FLOATS = (torch.float32, torch.bfloat16)


def run(name: str, *arguments) -> None:
    """Call a compiled body at the level of now."""
    status = native.library_function(name)(levels.code(), *arguments)
    if status:
        raise native.error_of(status, "the sequence")


def rows(x: Tensor) -> Tensor:
    """x [..., width] as it is where its last axis is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def plain(x: Tensor | None) -> Tensor | None:
    """A parameter as the bodies read it: float32, contiguous."""
    if x is None or (x.dtype is torch.float32 and x.is_contiguous()):
        return x
    return x.float().contiguous()


OptionalTensor = TypeVar("OptionalTensor", Tensor, Tensor | None)


def one_type(*tensors: OptionalTensor) -> list[OptionalTensor]:
    """All as bfloat16 where all are, else as float32."""
    kinds = {x.dtype for x in tensors if x is not None}
    if kinds in ({torch.float32}, {torch.bfloat16}):
        return list(tensors)
    return [x if x is None else x.float() for x in tensors]


def checked_live_ranges(bounds: Tensor | None, batches: int, length: int) -> Tensor | None:
    """The first live position of every sequence, and the one behind its last: [batches, 2] int64, checked."""
    if bounds is None:
        return None
    if bounds.shape != (batches, 2) or bounds.dtype != torch.int64:
        description = f"{list(bounds.shape)} of {bounds.dtype}"
        raise native.KernelError(f"bounds {description} are not [{batches}, 2] of int64")
    first, last = bounds.unbind(1)
    if bool(((first < 0) | (last < first) | (last > length)).any()):
        raise native.KernelError(f"bounds leave a sequence of {length} positions, or end before they begin")
    return bounds.contiguous()


def inside(bounds: Tensor | None, batches: int, length: int) -> Tensor:
    """Mask of live positions, [batches, length] bool."""
    if bounds is None:
        return torch.ones(batches, length, dtype=torch.bool)
    position = torch.arange(length)
    return (position >= bounds[:, :1]) & (position < bounds[:, 1:])


def as_x(x: Tensor, *_) -> Tensor:
    """The fake of a kernel whose result is as what it is given first, but contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def as_second(state: Tensor, x: Tensor, *_) -> Tensor:
    """The fake of one that is given a state first."""
    return as_x(x)


def fit(label: str, x: Tensor | None, *shape: int) -> None:
    if x is not None and x.shape != shape:
        raise native.KernelError(f"{label} of shape {list(x.shape)} does not fit: {list(shape)} is wanted")


def layout_of(x: Tensor | None) -> tuple:
    """Pointer of a tensor [b, t, w], and its strides."""
    return (None, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1))


def rows_of(x: torch.Tensor | None) -> tuple:
    """Pointer of a tensor [b, ...], and its first stride."""
    return (None, 0) if x is None else (x.data_ptr(), x.stride(0))

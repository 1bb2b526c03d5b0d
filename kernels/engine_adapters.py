"""Adapters of the native engine: low-rank updates of registers, checked, then laid out as C++ reads them."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .engine_steps import OPS, Step
from .native import KernelError

MAX_RANK = 1024
_LANE = 16  # numbers of a vector: factors are padded to whole ones
_ROW_WISE = (
    "norm",
    *("act", "add", "mul", "scale", "shift", "softcap", "clip", "xielu"),
    *("add_vector", "mul_vector"),
)


@dataclass(frozen=True)
class LowRankUpdate:
    """y += up (down x + bias), of tokens that name the adapter: factors and inputs in bfloat16, sums in float32.

    x      register: what a linear step reads (LoRA), or y itself (interventions)
    y      register: what that linear step writes, or a step that computes each row by itself
    down   [rank, width of x]
    up     [width of y, rank]
    bias   [rank], or None
    """

    x: int
    y: int
    down: Tensor
    up: Tensor
    bias: Tensor | None = None


class LowRank(ctypes.Structure):
    """`LowRank` of adapters.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("step", "rank")),
        *((name, ctypes.c_void_p) for name in ("down", "bias", "up")),
    ]


class AdapterLayout:
    """Updates of one adapter for C++, which reads factors where they lie: they live as long as this does."""

    def __init__(self, steps: Sequence[Step], widths: Sequence[int], updates: Sequence[LowRankUpdate]):
        numbers = {step.to: number for number, step in enumerate(steps)}
        self.factors: list[Tensor] = []
        self.updates = (LowRank * len(updates))()
        if not updates:
            raise KernelError("an adapter without updates changes nothing")
        if len({update.y for update in updates}) < len(updates):
            raise KernelError("an adapter updates a register twice")
        for entry, update in zip(self.updates, updates, strict=True):
            if update.y not in numbers:
                raise KernelError(f"an adapter updates register {update.y}, which no step writes")
            step = numbers[update.y]
            _check_target(steps[step], update)
            down, up, bias = _checked_factors(widths, update)
            self.factors += [t for t in (down, up, bias) if t is not None]
            entry.step, entry.rank = step, len(update.down)
            entry.down, entry.up = down.data_ptr(), up.data_ptr()
            entry.bias = None if bias is None else bias.data_ptr()


def _check_target(step: Step, update: LowRankUpdate) -> None:
    op = OPS[step.op]
    x = step.x if op == "linear" else update.y
    if op != "linear" and op not in _ROW_WISE:
        raise KernelError(
            f"an adapter updates register {update.y}, which a step `{op}` writes for several rows at once"
        )
    if update.x != x:
        raise KernelError(f"an adapter reads register {update.x}, and an update of {update.y} reads {x}")


def _checked_factors(widths: Sequence[int], update: LowRankUpdate) -> tuple[Tensor, Tensor, Tensor | None]:
    """Factors as C++ reads them."""
    down, up, bias = update.down, update.up, update.bias
    rank = len(down) if down.dim() == 2 else 0
    if not 1 <= rank <= MAX_RANK:
        raise KernelError(f"an adapter of rank {rank}: the engine computes 1 to {MAX_RANK}")
    expected: Mapping[str, tuple[int, ...]] = {"down": (rank, widths[update.x]), "up": (widths[update.y], rank)}
    for name, tensor in (("down", down), ("up", up)):
        if tuple(tensor.shape) != expected[name]:
            raise KernelError(
                f"`{name}` of an adapter is {list(tensor.shape)}, and the plan needs {list(expected[name])}"
            )
    if bias is not None and tuple(bias.shape) != (rank,):
        raise KernelError(f"`bias` of an adapter is {list(bias.shape)}, and its rank is {rank}")
    packed = (
        _interleave_bfloat16_pairs(down),
        _interleave_bfloat16_pairs(up),
        None if bias is None else _pad_axes_to_16(bias.float()),
    )
    if not all(bool(t.isfinite().all()) for t in packed if t is not None):
        raise KernelError("an adapter has a number that is NaN or infinite")
    return packed


def _pad_axes_to_16(tensor: Tensor) -> Tensor:
    """The tensor with zeros behind it, to multiples of 16 along every axis."""
    padded = torch.zeros([-(-size // _LANE) * _LANE for size in tensor.shape], dtype=tensor.dtype)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor.detach()
    return padded


def _interleave_bfloat16_pairs(matrix: Tensor) -> Tensor:
    """A matrix [outputs, inputs] in bfloat16 as [blocks of 16 outputs, pairs of inputs, 16, 2]."""
    padded = _pad_axes_to_16(matrix.bfloat16())
    return padded.view(-1, _LANE, padded.shape[1] // 2, 2).transpose(1, 2).contiguous()

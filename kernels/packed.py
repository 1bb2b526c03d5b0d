"""Packed weights: a uint8 tensor that holds a whole layer in the order in which a kernel reads it.

`kernels/src/packed.h` draws the format. A buffer is checked once, deeply, before a kernel first reads it: at
packing, at loading, or at the first call; changing it in place makes it unchecked again.
"""

import ctypes
import mmap
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from . import levels, native

KINDS = {name: number for number, name in enumerate(native.LINEAR, start=1)}
HUGE = 2 << 20
_CHECKED = "_effc_checked"


class Header(ctypes.LittleEndianStructure):
    """The first 128 bytes of a buffer."""

    _fields_ = [
        ("magic", ctypes.c_char * 8),
        ("order", ctypes.c_uint32),
        ("version", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
        ("group", ctypes.c_uint32),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("kept", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
        ("tiles", ctypes.c_int64),
        ("offsets_at", ctypes.c_int64),
        ("scales_at", ctypes.c_int64),
        ("sums_at", ctypes.c_int64),
        ("stream_at", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("hash", ctypes.c_uint64),
        ("pad", ctypes.c_char * 16),
    ]


@dataclass(frozen=True)
class PackedFacts:
    """Header of a packed weight. `n_nonzero`: weights stored (of blocks: 16 by 2 each); `group`: int4 inputs that
    share a scale, else 0.
    """

    kernel: str
    n: int
    k: int
    n_nonzero: int
    bytes: int
    group: int = 0

    @property
    def density(self) -> float:
        per = 32 if self.kernel == "block_sparse_linear" else 1
        return min(1.0, self.n_nonzero * per / (self.n * self.k)) if "sparse" in self.kernel else 1.0


def pack(kernel: str, weight: Tensor, threads: int | None = None) -> Tensor:
    """A linear layer's weight in the form that `kernel` reads.

    weight  [n, k]     float32 or bfloat16, finite; others are converted
    return  [bytes]    uint8; equal weights give equal bytes, at every level and with any number of threads
    """
    weight = to_packable_weight(weight)
    (n, k), label = weight.shape, weight_label(weight)
    head = Header(kind=KINDS[kernel], n=n, k=k)
    native.call_or_raise("pack_begin", ctypes.byref(head), label=label)
    offsets = torch.zeros(head.blocks + 1, dtype=torch.int64)
    scales = torch.zeros(16 * head.blocks)
    fixed = (
        weight.data_ptr(),
        weight.stride(0),
        int(weight.dtype == torch.float32),
        offsets.data_ptr(),
        scales.data_ptr(),
    )
    threads = torch.get_num_threads() if threads is None else threads
    native.call_or_raise("pack", levels.active_level_code(), ctypes.byref(head), *fixed, None, threads, label=label)
    packed = allocate_zero_bytes(head.bytes)
    native.call_or_raise(
        "pack", levels.active_level_code(), ctypes.byref(head), *fixed, packed.data_ptr(), threads, label=label
    )
    mark_as_checked(kernel, packed)
    return packed


def to_packable_weight(weight: Tensor) -> Tensor:
    """A weight as packing reads it: [n, k] float32 or bfloat16 on the CPU, rows contiguous."""
    if weight.dim() != 2 or 0 in weight.shape:
        raise native.KernelError(
            f"a weight of shape {list(weight.shape)} can't be packed: "
            "a linear layer has at least one output and one input"
        )
    weight = weight.detach().to("cpu")
    if weight.dtype not in (torch.float32, torch.bfloat16):
        weight = weight.float()
    return weight if weight.stride(1) == 1 else weight.contiguous()


def weight_label(weight: Tensor) -> str:
    """Name of a weight in messages."""
    return f"a weight of {weight.shape[0]} outputs and {weight.shape[1]} inputs"


def mark_as_checked(kernel: str, packed: Tensor) -> None:
    """Remember that a buffer was made or checked here."""
    setattr(packed, _CHECKED, (KINDS[kernel], _tensor_version_counter(packed)))


def checked_aligned_copy(kernel: str, packed: Tensor, out_features: int) -> Tensor:
    """A buffer that came from outside, checked deeply and copied to where a kernel reads it fastest."""
    packed = packed.detach().to("cpu")
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise native.KernelError("the packed weight can't be used: it is not a row of bytes")
    aligned = allocate_zero_bytes(packed.numel())
    aligned.copy_(packed)
    check_packed_weight(kernel, aligned, out_features)
    return aligned


def kernel_of(packed: Tensor) -> str:
    """The kernel that a buffer says it is packed for; "" where it says none."""
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() < 128:
        return ""
    kind = Header.from_buffer_copy(bytes(packed[:128].numpy())).kind
    return next((name for name, code in KINDS.items() if code == kind), "")


def check_packed_weight(kernel: str, packed: Tensor, out_features: int = -1, reads_all_bytes: bool = True) -> None:
    """Raise where a buffer is not a sound packed weight for this kernel; remember where it is.

    reads_all_bytes   read it whole; else its header and sizes alone, which is not remembered
    """
    kind = KINDS[kernel]
    if getattr(packed, _CHECKED, None) == (kind, _tensor_version_counter(packed)):
        return
    if packed.dtype != torch.uint8 or packed.dim() != 1 or not packed.is_contiguous():
        raise native.KernelError("the packed weight can't be used: it is not a row of bytes")
    native.call_or_raise("check", packed.data_ptr(), packed.numel(), kind, out_features, int(reads_all_bytes))
    if reads_all_bytes:
        mark_as_checked(kernel, packed)


def _tensor_version_counter(packed: Tensor) -> int:
    """Version counter of a tensor, as far as torch counts."""
    return 0 if packed.is_inference() else packed._version


def packed_facts(packed: Tensor) -> PackedFacts:
    """Kernel, sizes and density of a checked buffer."""
    head = Header.from_buffer_copy(bytes(packed[:128].numpy()))
    return PackedFacts(kernel_of(packed), head.n, head.k, head.kept, head.bytes, head.group & 0xFFFF)


def allocate_zero_bytes(count: int) -> Tensor:
    """`count` zero bytes; from 1 MiB up on huge pages, which are worth a quarter of the bandwidth."""
    if count < HUGE // 2 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(count, dtype=torch.uint8)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        memory = mmap.mmap(-1, (count + HUGE - 1) // HUGE * HUGE + HUGE, flags=flags)
    except OSError as error:
        raise MemoryError(f"can't allocate memory: {count} bytes for a packed weight") from error
    with suppress(OSError):  # a system without them: ordinary pages then
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE
    return torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=start)

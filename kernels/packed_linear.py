"""The family of linear kernels: y = x @ w.T + bias with w packed beforehand."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from . import levels, native
from . import packed as packing
from .kernel import Kernel, is_unobserved_cpu_call

LINEARS: dict[str, type["PackedLinear"]] = {}  # those of `KERNELS` that do a linear module's work
_FLOATS = (torch.float32, torch.bfloat16)
MAX_INPUTS = 66000  # of an int8 layer: 255 * 127 * k stays within int32


class PackedLinear(Kernel):
    """x [..., k] float32 or bfloat16, packed from `pack`, bias [n] or None, n outputs -> y [..., n] as x."""

    schema = "(Tensor x, Tensor packed, Tensor? bias, int n) -> Tensor"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.name:
            LINEARS[cls.name] = cls

    @classmethod
    def pack(cls, weight: Tensor, threads: int | None = None) -> Tensor:
        """A weight [n, k] in this kernel's form."""
        return packing.pack(cls.name, weight, threads)

    @classmethod
    def unpack(cls, packed: Tensor) -> Tensor:
        """The weight [n, k] float32 that a packed one stands for, without the compiled library's help."""
        packing.check_packed_weight(cls.name, packed)
        return unpack_packed_weight(packed)

    @classmethod
    def call_op_or_kernel(cls, x: Tensor, packed: Tensor, bias: Tensor | None, n: int) -> Tensor:
        """Result of the op. Where nothing records it, its body is called at once: for one row of a small layer
        torch's dispatcher takes a quarter as long as the product, mostly to find that no gradient is wanted.
        """
        if packed.is_cpu and is_unobserved_cpu_call(x):
            return cls.native(x, packed, bias, n)
        return getattr(torch.ops.effc, cls.name).default(x, packed, bias, n)

    @staticmethod
    def fake(x, packed, bias, n) -> Tensor:
        return x.new_empty((*x.shape[:-1], n))

    @classmethod
    def reference(cls, x, packed, bias, n) -> Tensor:
        y = linear(x.to(torch.bfloat16).float(), cls.unpack(packed), None if bias is None else bias.float())
        return y.to(x.dtype)

    @classmethod
    def native(cls, x, packed, bias, n) -> Tensor:
        packing.check_packed_weight(cls.name, packed, n)
        shape, dtype = x.shape, x.dtype
        if not shape:
            raise native.KernelError("a single number can't be a layer's input")
        k = shape[-1]
        if dtype not in _FLOATS:
            if not dtype.is_floating_point:
                raise native.KernelError(f"an input of {dtype} is no floating point numbers")
            return cls.native(x.float(), packed, bias, n).to(dtype)
        stride = k
        if not x.is_contiguous():
            x = x.reshape(-1, k)
            stride, step = x.stride()
            if step != 1:
                x, stride = x.contiguous(), k
        if bias is not None:
            bias = _checked_contiguous_bias(bias, n)
        y = torch.empty((*shape[:-1], n), dtype=dtype)
        weight = packed.data_ptr(), packed.numel(), n, k
        rows = x.data_ptr(), x.numel() // (k or 1), stride, dtype is torch.float32
        shift = None if bias is None else bias.data_ptr(), bias is not None and bias.dtype is torch.float32
        status = native.library_function(cls.name)(
            levels.active_level_code(), *weight, *rows, *shift, y.data_ptr(), torch.get_num_threads()
        )
        if status:
            raise native.error_of_status(status)
        return y

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, packed, bias, _n = inputs
        ctx.save_for_backward(packed)
        ctx.inputs = x.shape[-1]
        ctx.bias_dtype = None if bias is None else bias.dtype

    @classmethod
    def backward(cls, ctx, grad) -> tuple[Tensor | None, ...]:
        # The packed weight is frozen; what trains beside it (adapters) needs the gradient of x.
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            weight = torch.ops.effc.unpack_linear(ctx.saved_tensors[0], grad.shape[-1], ctx.inputs)
            x_grad = grad @ weight.to(grad.dtype)
        if ctx.needs_input_grad[2]:
            bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return x_grad, None, bias_grad, None

    @classmethod
    def unsupported_reason(cls, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> str:
        if min(n, k) < 1:
            return "it has no outputs or no inputs"
        if not dtype.is_floating_point:
            return f"its weights are {dtype}, not floating point"
        return ""

    @staticmethod
    def cases() -> list[tuple[int, int]]:
        """Outputs and inputs: one, tails of 16 and of 32 and 64, more than one panel and one depth."""
        return [(1, 1), (3, 5), (16, 32), (17, 33), (48, 64), (65, 96), (130, 127), (20, 2100), (200, 257)]


class PackedLinearInt8(PackedLinear):
    """Packed linear with int8 weights, a scale per output, and x rounded row by row; sums are exact int32."""

    @classmethod
    def unsupported_reason(cls, n, k, dtype=torch.bfloat16) -> str:
        if k > MAX_INPUTS:
            return f"it has {k} inputs, and int32 sums hold {MAX_INPUTS}"
        return super().unsupported_reason(n, k, dtype)

    @classmethod
    def reference(cls, x, packed, bias, n) -> Tensor:
        return matmul_with_rounded_inputs(x, cls.unpack(packed), bias)


def _checked_contiguous_bias(bias: Tensor, n: int) -> Tensor:
    if bias.shape != (n,):
        raise native.KernelError(f"a bias of shape {list(bias.shape)} does not fit {n} outputs")
    if not bias.is_cpu:
        raise native.KernelError(f"the bias lies on {bias.device}, and the kernel runs on the CPU")
    return (bias if bias.dtype in _FLOATS else bias.float()).contiguous()


def matmul_with_rounded_inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, max_magnitude: Tensor | None = None
) -> Tensor:
    """x @ weight.T + bias with every row of x rounded to 127ths of `max_magnitude` [..., 1] or of its largest."""
    rows = x.float()
    largest = rows.abs().amax(-1, keepdim=True) if x.shape[-1] else rows
    max_magnitude = largest if max_magnitude is None else max_magnitude
    inverse = torch.where(
        largest > 1e-30, torch.full_like(max_magnitude, 127) / max_magnitude, 0.0
    )  # 127 / max_magnitude is rounded twice
    y = linear(((rows * inverse).round() * (max_magnitude / 127)).double(), weight.double())
    return (y + (0 if bias is None else bias.double())).to(x.dtype)


def unpack_packed_weight(packed: Tensor) -> Tensor:
    """The weight [n, k] float32 of a checked buffer, written from the format's description alone."""
    raw = packed.numpy()
    head = packing.Header.from_buffer_copy(raw[:128].tobytes())
    kernel = packing.packed_facts(packed).kernel
    if "int4" in kernel:
        return _unpack_int4(raw, head)
    offsets = raw[head.offsets_at : head.offsets_at + 8 * head.blocks + 8].view(np.int64)
    per_lane = 4 if "int8" in kernel else 2
    w = np.zeros((16 * head.blocks, head.tiles * 16 * per_lane), np.float32)
    for block in range(head.blocks):
        start = head.stream_at + offsets[block]
        block_numbers = unpack_block_vectors(raw[start : head.stream_at + offsets[block + 1]], kernel, head.tiles)
        lanes = block_numbers.reshape(-1, 16, per_lane)  # [groups, outputs, inputs of a group]
        w[16 * block : 16 * block + 16] = lanes.transpose(1, 0, 2).reshape(16, -1)
    if per_lane == 4:
        w *= raw[head.scales_at : head.scales_at + 64 * head.blocks].view(np.float32)[:, None]
    return torch.from_numpy(w[: head.n, : head.k].copy())


def _unpack_int4(raw: np.ndarray, head: packing.Header) -> Tensor:
    """The weight of an int4 buffer: scales, zeros, codes, each for all groups of a block."""
    group, groups = head.group & 0xFFFF, head.tiles
    blocks = raw[head.stream_at : head.bytes - 64].reshape(head.blocks, -1)
    halves = np.ascontiguousarray(blocks[:, : 32 * groups]).view(np.uint16).reshape(-1, groups, 16)
    scale = (halves.astype(np.uint32) << 16).view(np.float32).transpose(0, 2, 1)  # [blocks, outputs, groups]
    zero = np.full(scale.shape, 8, np.float32)
    if head.group >> 16:
        both = blocks[:, 32 * groups : 40 * groups].reshape(-1, groups, 8).transpose(0, 2, 1)
        zero = np.concatenate((both & 15, both >> 4), 1).astype(np.float32)
    lines = blocks[:, blocks.shape[1] - 8 * group * groups :].reshape(-1, groups * group // 8, 16, 1, 4)
    codes = np.concatenate((lines & 15, lines >> 4), 3).transpose(0, 2, 1, 3, 4)  # [blocks, outputs, lines, 2, 4]
    codes = codes.reshape(head.blocks, 16, groups, group).astype(np.float32)
    w = (codes - zero[..., None]) * scale[..., None]
    return torch.from_numpy(w.reshape(16 * head.blocks, -1)[: head.n, : head.k].copy())


def unpack_block_vectors(stream: np.ndarray, kernel: str, tiles: int) -> np.ndarray:
    """The weights of a block as [groups, one vector] of numbers."""
    element = np.int8 if "int8" in kernel else np.uint16
    if kernel.startswith("dense"):
        return _to_float32(stream[: 1024 * tiles].view(element))
    if kernel == "block_sparse_linear":
        return _to_float32(_unpack_block_sparse(stream, tiles))
    mask_bytes = 128 if element is np.int8 else 64
    dense, at = np.zeros((tiles, 1024 // element().itemsize), element), 0
    for tile in range(tiles):
        bits = np.unpackbits(stream[at : at + mask_bytes], bitorder="little").astype(bool)
        at += mask_bytes
        count = int(bits.sum()) * element().itemsize
        dense[tile][bits] = stream[at : at + count].copy().view(element)
        at += count
    return _to_float32(dense)


def _unpack_block_sparse(stream: np.ndarray, tiles: int) -> np.ndarray:
    count = int(stream[:8].view(np.int64)[0])
    at = 64 + (2 * count + 63) // 64 * 64
    values = stream[at : at + 64 * count].view(np.uint16).reshape(count, 32)
    dense = np.zeros((tiles * 16, 32), np.uint16)
    dense[stream[64 : 64 + 2 * count].view(np.uint16)] = values
    return dense


def _to_float32(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.int8:
        return values.astype(np.float32)
    return (values.astype(np.uint32) << 16).view(np.float32)

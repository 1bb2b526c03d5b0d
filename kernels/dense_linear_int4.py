"""Dense int4 weights with a scale for each output and group of 32, 64 or 128 inputs; x is rounded to int8 by groups.

weight = scale * (code - zero), code and zero in 0..15, scales bfloat16. Of a group the sum is exact int32; groups are
added in float32, in their order, so every level and any number of rows gives the same bits, but on AMX, where 16 rows
and more meet tiles of bfloat16. A weight that is on such a grid already, as `quantize.*` leaves it, keeps its codes;
others are rounded to the grid of least squared error.
"""

import ctypes

import torch
from torch import Tensor

from . import native
from . import packed as packing
from .codes import GROUPS, quantize_to_codes
from .packed_linear import PackedLinear, matmul_with_rounded_inputs

ZEROS = 1 << 16  # in a header's `group`: zeros are stored


class DenseLinearInt4(PackedLinear):
    """Dense int4 weights with a scale per output and group of inputs; x is rounded to int8 by groups."""

    name = "dense_linear_int4"

    @classmethod
    def pack(cls, weight: Tensor, threads: int | None = None, group_size: int = 64) -> Tensor:
        """A weight [n, k] in this kernel's form; `group_size` inputs share a scale, unless its own grid has others."""
        weight = packing.to_packable_weight(weight)
        if group_size not in GROUPS:
            raise native.KernelError(
                f"groups of {group_size} inputs can't be packed; {', '.join(map(str, GROUPS))} can"
            )
        (n, k), label = weight.shape, packing.weight_label(weight)
        if not weight.isfinite().all():
            raise native.KernelError(f"{label} can't be used: {native.SENTENCES['not_finite']}")
        grid_codes = quantize_to_codes(weight, group_size)
        zeros = bool((grid_codes.zero != 8).any())
        head = packing.Header(kind=packing.KINDS[cls.name], n=n, k=k, group=grid_codes.group | (ZEROS if zeros else 0))
        native.call_or_raise("pack_begin", ctypes.byref(head), label=label)
        stream = torch.cat(_int4_sections_of_blocks(grid_codes, zeros, head.blocks), 1)
        head.bytes = head.stream_at + stream.numel() + 64
        packed = packing.allocate_zero_bytes(head.bytes)
        packed[:128] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        offsets = torch.arange(head.blocks + 1) * stream.shape[1]
        packed[head.offsets_at : head.scales_at] = offsets.view(torch.uint8)
        packed[head.stream_at : head.bytes - 64] = stream.flatten()
        native.call_or_raise("pack_end", packed.data_ptr(), packed.numel(), head.kind, label=label)
        packing.mark_as_checked(cls.name, packed)
        return packed

    @classmethod
    def reference(cls, x, packed, bias, n) -> Tensor:
        weight, group = cls.unpack(packed), packing.packed_facts(packed).group
        padding = -weight.shape[1] % group
        by_groups = torch.nn.functional.pad(x, (0, padding)).unflatten(-1, (-1, group))
        wide = torch.nn.functional.pad(weight, (0, padding)).unflatten(-1, (-1, group))
        parts = [
            matmul_with_rounded_inputs(by_groups[..., i, :].double(), wide[:, i], None) for i in range(wide.shape[1])
        ]
        return (sum(parts) + (0 if bias is None else bias.double())).to(x.dtype)


def _int4_sections_of_blocks(grid_codes, has_zero_points: bool, n_blocks: int) -> list[Tensor]:
    """Scales, zeros and codes of all blocks, each [blocks, bytes] uint8, as `packed.h` draws them."""
    groups, rows = grid_codes.scale.shape[1], 16 * n_blocks
    scale = _pad_to_rows(grid_codes.scale.bfloat16().view(torch.int16), rows).reshape(n_blocks, 16, groups)
    sections = [scale.transpose(1, 2).contiguous().view(torch.uint8).reshape(n_blocks, -1)]
    if has_zero_points:
        zero = _pad_to_rows(grid_codes.zero.to(torch.uint8), rows).reshape(n_blocks, 2, 8, groups)
        sections.append((zero[:, 0] | zero[:, 1] << 4).transpose(1, 2).reshape(n_blocks, -1))
    sections.append(torch.zeros(n_blocks, -sum(s.shape[1] for s in sections) % 64, dtype=torch.uint8))
    lines = _pad_to_rows(grid_codes.code, rows).reshape(
        n_blocks, 16, -1, 2, 4
    )  # [blocks, outputs, lines, halves, inputs]
    both = lines[..., 0, :] | lines[..., 1, :] << 4
    return [*sections, both.transpose(1, 2).reshape(n_blocks, -1)]


def _pad_to_rows(values: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, 0, 0, count - len(values)))

"""Weights on grids of 16 values in blocks of 32, as llama.cpp's `q4_0` and `q4_1` hold them: the same codes."""

import torch
from torch import Tensor

from ....dsl.syntax.diagnostics import Diagnostic
from ....kernels.codes import BITS, Codes, codes_if_on_grid
from ...plugin.interfaces import Pass
from ...transforms.search.quantizing import Quantizer
from .refusal import incompatible_type

BLOCK = 32  # weights of a row that share a scale
KINDS = ("q4_0", "q4_1")
_MIDDLE = 8  # the zero of every block of q4_0


def quantizes_to_block_grid(step: Pass) -> bool:
    """Whether a pass puts weights on such a grid. A group of 0 is a whole row, of which every 32 are on one, too."""
    return isinstance(step, Quantizer) and step.bits <= BITS and step.group % BLOCK == 0


def no_matrix_on_grid_diagnostic(type_name: str) -> Diagnostic:
    return incompatible_type(
        f"no matrix is on a grid of four bits in groups of {BLOCK}, and `{type_name}` rounds none",
        help=f"quantise first: `quantize.gptq(bits: {BITS}, group: {BLOCK}, zero: middle, data: ...)`",
    )


def block_codes_if_on_grid(weight: Tensor, weight_name: str, type_name: str) -> Codes | None:
    """The codes of a matrix [n, k] that is on such a grid; None of one that is on none.

    Raises Reject (unfit-type) where the grid is one that `type_name` has not.
    """
    grid_codes = codes_if_on_grid(weight, BLOCK) if weight.shape[1] % BLOCK == 0 else None
    if grid_codes is None:
        return None
    if type_name == "q4_0" and (grid_codes.zero != _MIDDLE).any():
        raise incompatible_type(
            f"{weight_name} has blocks whose 0 is not the middle code, and q4_0 has no others",
            help="write `type: q4_1`, or quantise with `zero: middle`",
        ).rejection()
    if not torch.equal(grid_codes.scale.half().float(), grid_codes.scale):
        raise incompatible_type(f"{weight_name} has scales that float16 has not", help="write `type: bf16`").rejection()
    return grid_codes


def pack_blocks(codes: Codes, type_name: str) -> Tensor:
    """Bytes of a matrix, [n, k / 32 * bytes of a block] uint8.

    A block is its scale, with q4_1 what code 0 stands for, and 16 bytes: code i below and code i + 16 above.
    Source: `block_q4_0` and `block_q4_1` of ggml, ggml-common.h. What code 0 stands for has 11 bits there, of which the
    product of scale and zero may need 12: it is off by up to 1/200 of a step, and codes are exact.
    """
    n = len(codes.code)
    both = codes.code.view(n, -1, 2, BLOCK // 2)  # [n, blocks, halves, 16]
    parts = [_float16_bytes(codes.scale)]
    if type_name == "q4_1":
        parts.append(_float16_bytes(-codes.scale * codes.zero))
    return torch.cat([*parts, both[:, :, 0] | both[:, :, 1] << 4], 2).flatten(1)


def _float16_bytes(values: Tensor) -> Tensor:
    """[n, blocks] -> their float16 bytes, [n, blocks, 2]."""
    return values.half()[:, :, None].contiguous().view(torch.uint8)

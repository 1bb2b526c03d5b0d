"""Dense int8 weights with one scale per output; x is rounded row by row to 8 bits, its outliers to 16.

weight = scale * code as `dense_linear_int8` has it, byte for byte. A row of x becomes codes of -32639..32639, each
256 * high + low with high and low in int8: two rows of int8, which meet every vector of weights once it is loaded. Both
sums are exact int32, so every level gives the same result; they are put together in float32.

The step is chosen for all but one in 96 inputs, those with the largest magnitudes (what LLM.int8() calls outliers,
arXiv 2208.07339): these alone have upper bytes that are not zero. Where weights come out of memory the second product
costs little; with many rows it is left out wherever the upper bytes of a block of rows are zero.
"""

import torch
from torch import Tensor

from .packed_linear import PackedLinearInt8, matmul_with_rounded_inputs

MOST_CODE = 32639  # 127 * 256 + 127
INPUTS_PER_OUTLIER = 96
_EIGHTH_OF_AN_OCTAVE = 16  # between the upper 16 bits of float32


class DenseLinearInt8Int16(PackedLinearInt8):
    """Dense int8 weights with one scale per output; x is rounded row by row to 8 bits, its outliers to 16."""

    name = "dense_linear_int8_int16"

    @classmethod
    def reference(cls, x, packed, bias, n) -> Tensor:
        return matmul_with_rounded_inputs(x, cls.unpack(packed), bias, clipping_threshold(x.float()))


def clipping_threshold(x: Tensor) -> Tensor:
    """Magnitude that at most one input in 96 of a row exceeds, [..., k] -> [..., 1]; a row's step is a 127th of it.

    Found by halving the upper 16 bits of float32 between the largest and its 257th, down to an eighth of an octave;
    then the largest magnitude whose bits are not above.
    """
    if not x.shape[-1]:
        return x.new_zeros((*x.shape[:-1], 1))
    magnitudes = x.abs().contiguous()
    rare = -(-x.shape[-1] // INPUTS_PER_OUTLIER)
    largest = magnitudes.amax(-1, keepdim=True)
    least = largest * (torch.tensor(127.0) / MOST_CODE)
    bits, low, high = (part.view(torch.int32) >> 16 for part in (magnitudes, least, largest))
    while (wide := high - low > _EIGHTH_OF_AN_OCTAVE).any():
        middle = (low + high) // 2
        is_enough = (bits > middle).sum(-1, keepdim=True) <= rare
        high = torch.where(wide & is_enough, middle, high)
        low = torch.where(wide & ~is_enough, middle, low)
    return torch.maximum(torch.where(bits <= high, magnitudes, 0.0).amax(-1, keepdim=True), least)

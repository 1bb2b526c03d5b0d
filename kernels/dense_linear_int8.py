"""Dense int8 weights with one scale per output; x is rounded to int8 row by row.

weight = scale * code, code in -127..127, scale = largest magnitude of the output / 127. Sums are exact
int32, so every level gives the same result. What torch calls dynamic quantisation, with a scale per row
instead of one.
"""

import torch

from .packed_linear import MOST_INPUTS, PackedLinear, quantised


class DenseLinearInt8(PackedLinear):
    """Dense int8 weights with one scale per output; x is rounded to int8 row by row."""

    name = "dense_linear_int8"

    @classmethod
    def accepts(cls, n, k, dtype=torch.bfloat16):
        if k > MOST_INPUTS:
            return f"it has {k} inputs, and int32 sums hold {MOST_INPUTS}"
        return super().accepts(n, k, dtype)

    @classmethod
    def reference(cls, x, packed, bias, n):
        return quantised(x, cls.unpack(packed), bias)

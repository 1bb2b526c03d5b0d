"""int8 weights of which zeros are not stored, one scale per output; x is rounded row by row.

As `dense_linear_int8`; a weight that rounds to code 0 is not stored. 64 weights come out of one expansion,
twice as many as with bfloat16, so the limit that processors set to a bitmap lies twice as high.
"""

import torch

from .packed_linear import MOST_INPUTS, PackedLinear, quantised


class SparseLinearInt8(PackedLinear):
    """int8 weights of which zeros are not stored, one scale per output; x is rounded row by row."""

    name = "sparse_linear_int8"

    @classmethod
    def accepts(cls, n, k, dtype=torch.bfloat16):
        if k > MOST_INPUTS:
            return f"it has {k} inputs, and int32 sums hold {MOST_INPUTS}"
        return super().accepts(n, k, dtype)

    @classmethod
    def reference(cls, x, packed, bias, n):
        return quantised(x, cls.unpack(packed), bias)

"""bfloat16 weights of which zeros are not stored: tile bitmaps.

16 outputs by 32 inputs are one tile: a bit per weight, then the weights that are not zero, expanded in
registers. 1/16 + density of the dense bytes, so it needs no more than 6 % of zeros to be the smaller one.
"""

from .packed_linear import PackedLinear


class SparseLinear(PackedLinear):
    """bfloat16 weights of which zeros are not stored: tile bitmaps."""

    name = "sparse_linear"

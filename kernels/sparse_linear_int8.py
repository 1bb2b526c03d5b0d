"""int8 weights of which zeros are not stored, one scale per output; x is rounded row by row.

As `dense_linear_int8`; a weight that rounds to code 0 is not stored. 64 weights come out of one expansion,
twice as many as with bfloat16, so the limit that processors set to a bitmap lies twice as high.
"""

from .packed_linear import PackedLinearInt8


class SparseLinearInt8(PackedLinearInt8):
    """int8 weights of which zeros are not stored, one scale per output; x is rounded row by row."""

    name = "sparse_linear_int8"

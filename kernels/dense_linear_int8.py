"""Dense int8 weights with one scale per output; x is rounded to int8 row by row.

weight = scale * code, code in -127..127, scale = largest magnitude of the output / 127. Sums are exact
int32, so every level gives the same result. What torch calls dynamic quantisation, with a scale per row
instead of one.
"""

from .packed_linear import PackedLinearInt8


class DenseLinearInt8(PackedLinearInt8):
    """Dense int8 weights with one scale per output; x is rounded to int8 row by row."""

    name = "dense_linear_int8"

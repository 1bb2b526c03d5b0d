"""Dense int8 weights with one scale per output; x is rounded to 16 bits row by row.

weight = scale * code as `dense_linear_int8` has it, byte for byte. A row of x becomes codes of -32639..32639, each
256 * high + low with high and low in int8: two rows of int8, which meet every vector of weights once it is loaded. Both
sums are exact int32, so every level gives the same result; they are put together in float32.

An input is off by at most its row's largest magnitude / 65_000 (half a step is that / 65_278, the rest float32). Where
weights come out of memory the second product costs little; with many rows the products take twice as long.
"""

from .packed_linear import PackedLinearInt8


class DenseLinearInt8Int16(PackedLinearInt8):
    """Dense int8 weights with one scale per output; x is rounded to 16 bits row by row."""

    name = "dense_linear_int8_int16"
    steps = 32639  # 127 * 256 + 127

"""Dense bfloat16 weights, packed in the order in which products read them.

float32 sums. Where a layer has no zeros worth skipping this reads the same bytes as torch does, but on every
call torch rearranges a plain weight first, which is what one row of x spends most of its time with.
"""

from .packed_linear import PackedLinear


class DenseLinear(PackedLinear):
    """Dense bfloat16 weights, packed in the order in which products read them."""

    name = "dense_linear"

"""Decode attention over a dense cache of keys and values: `Cache` in `cache.py` holds and fills it."""

from .packed_attention import PackedAttention


class DenseAttention(PackedAttention):
    """softmax(q @ k.T * scale) @ v for one new token, all query heads of a key head in one pass, float32 softmax."""

    name = "dense_attention"

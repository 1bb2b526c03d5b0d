"""Decode attention over a dense cache of keys and values: `Cache` in `cache.py` holds and fills it."""

from .packed_attention import PackedAttention


class DenseAttention(PackedAttention):
    """softmax(q @ k.T * scale) @ v for one new token; softmax in float32."""

    name = "dense_attention"

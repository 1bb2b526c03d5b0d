"""Decode attention over a sparse cache of keys and values: `Cache` in `cache.py` holds and fills it."""

from .packed_attention import PackedAttention


class SparseAttention(PackedAttention):
    """softmax(q @ k.T * scale) @ v for one new token; softmax in float32."""

    name = "sparse_attention"

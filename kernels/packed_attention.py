"""The family of decode attention kernels: one new token of every sequence over a cache (`cache.py`)."""

import numpy as np
import torch
from torch import Tensor

from . import levels, native
from .kernel import Kernel
from .packed_linear import unpack_block_vectors


class PackedAttention(Kernel):
    """q [sequences, query heads, d] and the parts of a `Cache` -> the attended values, as q."""

    schema = (
        "(Tensor q, Tensor stream, Tensor offsets, Tensor keys, Tensor values, int blocks, int recent, "
        "float scale) -> Tensor"
    )

    @staticmethod
    def fake(q, stream, offsets, keys, values, n_blocks, n_recent, scale) -> Tensor:
        return torch.empty_like(q, memory_format=torch.contiguous_format)

    @classmethod
    def reference(cls, q, stream, offsets, keys, values, n_blocks, n_recent, scale) -> Tensor:
        sparse, d = cls.name == "sparse_attention", q.shape[-1]
        stored_heads = [
            unpack_head_blocks(stream[h], offsets[h, : n_blocks + 1], d, sparse) for h in range(len(stream))
        ]
        k = torch.stack([torch.cat([w[0], new[:n_recent].float()]) for w, new in zip(stored_heads, keys, strict=True)])
        v = torch.stack(
            [torch.cat([w[1], new[:n_recent].float()]) for w, new in zip(stored_heads, values, strict=True)]
        )
        grouped = q.bfloat16().float().reshape(len(stream), -1, d)  # [heads, group, d]
        return ((grouped @ k.mT * scale).softmax(-1) @ v).reshape(q.shape).to(q.dtype)

    @classmethod
    def native(cls, q, stream, offsets, keys, values, n_blocks, n_recent, scale) -> Tensor:
        _refuse_mismatched_cache(q, stream, offsets, keys, values, n_blocks, n_recent)
        if q.dtype not in (torch.float32, torch.bfloat16):
            q = q.float()
        q = q.contiguous()
        out, heads = torch.empty_like(q), len(stream)
        at = (t.data_ptr() for t in (q, stream, offsets, keys, values, out))
        group, strides = q.shape[0] * q.shape[1] // heads, (stream.stride(0), offsets.stride(0), keys.shape[1])
        sizes = heads, group, q.shape[2], n_blocks, n_recent, *strides
        is_float, threads = q.dtype == torch.float32, torch.get_num_threads()
        native.call_or_raise(
            cls.name, levels.active_level_code(), *at, *sizes, scale, is_float, threads, label="the cache"
        )
        return out

    @staticmethod
    def unsupported_reason(heads: int, key_heads: int, head_dim: int) -> str:
        if heads % key_heads:
            return f"{heads} query heads are not a multiple of {key_heads} key heads"
        return f"a head has {head_dim} dimensions, and the kernel takes 1024" if head_dim > 1024 else ""

    @staticmethod
    def cases() -> list[tuple[int, int, int, int]]:
        """Key heads, query heads of each, dimensions, tokens: tails of 16 and 32, odd ones, several pieces."""
        return [
            (1, 1, 16, 1),
            (2, 3, 64, 31),
            (3, 3, 64, 100),
            (1, 4, 128, 700),
            (2, 2, 80, 65),
            (1, 7, 33, 130),
            (1, 17, 32, 97),
        ]


def _refuse_mismatched_cache(q, stream, offsets, keys, values, n_blocks, n_recent) -> None:
    rows = len(stream)
    if q.dim() != 3 or not q.shape[0] or q.shape[0] * q.shape[1] % rows or rows % q.shape[0]:
        raise native.KernelError(f"a query of shape {list(q.shape)} does not fit a cache of {rows} heads")
    same = keys.shape == values.shape and keys.shape[::2] == (rows, q.shape[2]) and len(offsets) == rows
    typed = (stream.dtype, offsets.dtype) == (torch.uint8, torch.int64)
    typed &= keys.dtype == values.dtype == torch.bfloat16
    plain = all(t.is_contiguous() for t in (stream, offsets, keys, values))
    if not (same and typed and plain and stream.shape[1] >= 4096):
        raise native.KernelError("the parts of the cache do not belong together")


def unpack_head_blocks(stream: Tensor, offsets: Tensor, head_dim: int, sparse: bool) -> tuple[Tensor, Tensor]:
    """Keys and values [tokens, d] float32 of one head's blocks, from the format's description alone."""
    keys, values, raw = [torch.zeros(0, head_dim)], [torch.zeros(0, head_dim)], stream.numpy()
    key_tiles, lanes = -(-head_dim // 32), -(-head_dim // 16)
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        kind = "sparse_linear" if sparse else "dense_linear"
        numbers = unpack_block_vectors(raw[start:stop], kind, 2 * key_tiles + lanes)
        tiles = numbers.reshape(-1, 16, 16, 2)  # [tile, pair, lane, 2]
        part = tiles[: 2 * key_tiles].reshape(2, key_tiles, 16, 16, 2).transpose(0, 3, 1, 2, 4).reshape(32, -1)
        keys.append(torch.from_numpy(np.ascontiguousarray(part[:, :head_dim])))
        part = tiles[2 * key_tiles :].transpose(1, 3, 0, 2).reshape(32, -1)
        values.append(torch.from_numpy(np.ascontiguousarray(part[:, :head_dim])))
    return torch.cat(keys), torch.cat(values)

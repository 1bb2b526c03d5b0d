"""A cache of keys and values that keeps growing and, where asked, forgets the small ones.

The newest tokens lie as they came. When 32 of them are older than the window they become a block: tiles, as
the attention kernels read them. In a sparse cache a block keeps, of each head, the share `keep` of keys and
of values that is largest in magnitude; the first tokens (`sinks`), which attention always looks at, are kept
whole.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import levels, native
from .packed import allocate_zero_bytes

TOKENS = 32
_SLACK = 4096


@dataclass
class Cache:
    """Keys and values of one layer for `sequences` sequences of one length.

    heads     key heads; query heads share them in groups
    d         dimensions of a head
    longest   tokens that fit
    keep      (keys, values): share that a block keeps, 1.0 and 1.0 for a dense cache
    window    newest tokens that stay whole, a multiple of 32
    sinks     first tokens that stay whole, rounded up to 32
    """

    heads: int
    d: int
    longest: int
    sequences: int = 1
    keep: tuple[float, float] = (1.0, 1.0)
    window: int = 32
    sinks: int = 32
    blocks: int = field(default=0, init=False)
    recent: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        assert self.window % TOKENS == 0, f"a window of {self.window} tokens"
        assert 0 < self.d <= 1024 and min(self.heads, self.longest, self.sequences) > 0
        rows, max_tiles = self.heads * self.sequences, -(-self.longest // TOKENS)
        tiles = 2 * -(-self.d // 32) + -(-self.d // 16)
        self._capacity = max_tiles * tiles * (1088 if self.sparse else 1024) + _SLACK
        # Pages that nothing was written to take no memory, so a sparse cache costs what it holds.
        self.stream = allocate_zero_bytes(rows * self._capacity).view(rows, self._capacity)
        self.offsets = torch.zeros(rows, max_tiles + 1, dtype=torch.int64)
        self.keys = torch.zeros(rows, self.window + TOKENS, self.d, dtype=torch.bfloat16)
        self.values = torch.zeros_like(self.keys)

    @property
    def sparse(self) -> bool:
        return self.keep != (1.0, 1.0)

    @property
    def length(self) -> int:
        return TOKENS * self.blocks + self.recent

    @property
    def bytes(self) -> int:
        """Bytes that a pass over the cache reads."""
        blocks = int(self.offsets[:, self.blocks].sum())
        return blocks + self.recent * self.d * 4 * len(self.offsets)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens: keys and values [sequences, heads, tokens, d]."""
        assert keys.shape == values.shape == (self.sequences, self.heads, keys.shape[2], self.d), keys.shape
        tokens = keys.shape[2]
        if self.length + tokens > self.longest:
            length = self.length + tokens
            raise native.KernelError(f"the cache holds {self.longest} tokens, and {length} are wanted")
        keys, values = (t.detach().reshape(len(self.keys), tokens, self.d).bfloat16() for t in (keys, values))
        keys = torch.cat([self.keys[:, : self.recent], keys], 1)
        values = torch.cat([self.values[:, : self.recent], values], 1)
        full = max(0, (keys.shape[1] - self.window) // TOKENS)
        if full:
            self._pack_oldest_blocks(keys[:, : full * TOKENS], values[:, : full * TOKENS], full)
        self.recent = keys.shape[1] - full * TOKENS
        self.keys[:, : self.recent] = keys[:, full * TOKENS :]
        self.values[:, : self.recent] = values[:, full * TOKENS :]

    def _pack_oldest_blocks(self, keys: Tensor, values: Tensor, num_blocks: int) -> None:
        keys = self._zero_all_but_largest(keys, self.keep[0], num_blocks)
        values = self._zero_all_but_largest(values, self.keep[1], num_blocks)
        tokens = keys.data_ptr(), values.data_ptr(), len(keys), self.d, keys.stride(0)
        blocks = self.stream.data_ptr(), self._capacity, self.offsets.data_ptr(), self.offsets.stride(0)
        arguments = (
            levels.active_level_code(),
            *tokens,
            self.blocks,
            num_blocks,
            *blocks,
            self.sparse,
            torch.get_num_threads(),
        )
        native.call_or_raise("pack_tokens", *arguments, label="the cache")
        self.blocks += num_blocks

    def _zero_all_but_largest(self, tokens: Tensor, remaining_share: float, n_blocks: int) -> Tensor:
        """Zeros for all but the largest `remaining_share` of every head's numbers in every block past the sinks."""
        if remaining_share >= 1:
            return tokens.contiguous()
        blocks = tokens.reshape(len(tokens), n_blocks, -1).clone()
        spared = max(0, -(-self.sinks // TOKENS) - self.blocks)
        size = blocks.shape[2]
        dropped = size - max(1, round(remaining_share * size))
        if dropped and spared < n_blocks:
            magnitude = blocks[:, spared:].abs().float()
            bound = magnitude.kthvalue(dropped, dim=2, keepdim=True).values
            blocks[:, spared:].masked_fill_(magnitude <= bound, 0)
        return blocks.reshape(tokens.shape)

    def attend(self, q: Tensor, scale: float | None = None) -> Tensor:
        """Attention of one query token: q [sequences, query heads, d] -> the same shape."""
        name = "sparse_attention" if self.sparse else "dense_attention"
        op = getattr(torch.ops.effc, name)
        parts = self.stream, self.offsets, self.keys, self.values, self.blocks, self.recent
        return op(q, *parts, self.d**-0.5 if scale is None else scale)

"""Attention of one new token: query heads that share keys as rows, and over a cache that forgets."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ....kernels import ops as _registered  # noqa: F401 (makes torch.ops.effc.NAME)
from ....kernels.cache import Cache as Store
from ....kernels.native import KernelError

UNKNOWN = ("softcap", "s_aux")  # options that change what attention computes, unknown to rows and stores
_FIRST = 512  # tokens that a store has room for at first


def single_token_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Mapping[str, Any]
) -> Tensor | None:
    """Attention [b, 1, h, d] of one token whose heads share keys; None where that is not what is asked.

    q [b, h, 1, d], k and v [b, g, s, d]. torch's own reads the keys once for every query head.
    """
    b, h, t, _ = q.shape
    plain = module.config._attn_implementation == "sdpa" and not any(options.get(name) for name in UNKNOWN)
    if t != 1 or h == k.shape[1] or not plain or (mask is not None and mask.shape[1] != 1) or module.training:
        return None
    rows = q.reshape(b, k.shape[1], -1, q.shape[3])  # [b, g, h / g, d]
    mask = None if mask is None else mask[..., : k.shape[2]]
    out = scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=options.get("scaling"))
    return out.reshape(b, 1, h, v.shape[3])


class PackedLayer(CacheLayerMixin):
    """A layer of transformers' cache that holds tokens as our attention kernels read them.

    Sequences that are padded on the left alike share a store; what they are padded with is not stored.
    keep      (keys, values): share that every block of 32 tokens keeps once it leaves the window
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, keep: tuple[float, float], window: int, sinks: int):
        super().__init__()
        self.keep, self.window, self.sinks = keep, window, sinks
        self.length = 0  # positions, padding included
        self.stores: list[tuple[int, list[int], Store]] = []  # padding, sequences, their tokens

    def append_prompt(self, k: Tensor, v: Tensor, padding: list[int]) -> None:
        """Take a prompt: k and v [b, g, s, d]."""
        if k.shape[3] != v.shape[3]:
            raise KernelError(f"keys of {k.shape[3]} and values of {v.shape[3]} dimensions don't fit the cache")
        for pad in sorted(set(padding)):
            rows = [i for i, pads in enumerate(padding) if pads == pad]
            capacity = max(_FIRST, 2 * k.shape[2])
            store = Store(k.shape[1], k.shape[3], capacity, len(rows), self.keep, self.window, self.sinks)
            store.append(k[rows, :, pad:], v[rows, :, pad:])
            self.stores.append((pad, rows, store))
        self.length = k.shape[2]
        self.is_initialized = True

    def append_and_attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Add one token and attend: q [b, h, 1, d], k and v [b, g, 1, d] -> [b, 1, h, d]."""
        out = torch.empty_like(q[:, :, 0])  # [b, h, d]
        for index, (pad, rows, store) in enumerate(self.stores):
            if store.length == store.longest:
                store = copy_with_twice_the_capacity(store)
                self.stores[index] = (pad, rows, store)
            store.append(k[rows], v[rows])
            out[rows] = store.attend(q[rows, :, 0], scale).to(out.dtype)
        self.length += 1
        return out[:, None]

    def is_padded_like(self, padding: list[int]) -> bool:
        """Whether sequences are padded as they were."""
        return padding == self._padding_of_sequences()

    def gather_sequences(self, indices: list[int]) -> None:
        """Go on with these of the sequences, in this order; one may be chosen several times."""
        selected = []
        for pad, rows, store in self.stores:
            index_of = {row: index for index, row in enumerate(rows)}
            new = [i for i, row in enumerate(indices) if row in index_of]
            if new:
                selected.append((pad, new, copy_of_sequences(store, [index_of[indices[i]] for i in new])))
        self.stores = selected

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.gather_sequences(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.gather_sequences([i for i in range(len(self._padding_of_sequences())) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self.gather_sequences(torch.arange(len(self._padding_of_sequences()))[indices].tolist())

    def _padding_of_sequences(self) -> list[int]:
        pad_of = {row: pad for pad, rows, _ in self.stores for row in rows}
        return [pad_of[row] for row in sorted(pad_of)]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise KernelError("this cache is written by graphs that know it")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise KernelError("this cache can't hand out keys and values whole: another layer wrote to its place")

    def crop(self, tokens_to_remove: int) -> None:
        raise KernelError("a cache that has forgotten can't go back: generate without an assistant")

    def reset(self) -> None:
        self.stores, self.length, self.is_initialized = [], 0, False

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


def copy_with_twice_the_capacity(store: Store) -> Store:
    """Copy of a store with capacity for twice as many tokens."""
    new = Store(store.heads, store.d, 2 * store.longest, store.sequences, store.keep, store.window, store.sinks)
    return _copy_cached_rows(new, store, list(range(len(store.keys))))


def copy_of_sequences(store: Store, sequences: list[int]) -> Store:
    """The tokens of some sequences, in this order."""
    new = Store(store.heads, store.d, store.longest, len(sequences), store.keep, store.window, store.sinks)
    return _copy_cached_rows(new, store, [s * store.heads + h for s in sequences for h in range(store.heads)])


def _copy_cached_rows(new: Store, old: Store, rows: list[int]) -> Store:
    used = int(old.offsets[:, old.blocks].max())
    new.stream[:, :used] = old.stream[rows, :used]
    new.offsets[:, : old.blocks + 1] = old.offsets[rows, : old.blocks + 1]
    new.keys[:, : old.recent] = old.keys[rows, : old.recent]
    new.values[:, : old.recent] = old.values[rows, : old.recent]
    new.blocks, new.recent = old.blocks, old.recent
    return new


def get_or_create_packed_layer(
    cache: Any, slot: int, keep: tuple[float, float], window: int, sinks: int
) -> PackedLayer:
    """The place of a layer in transformers' cache, made ours when it is first used."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= slot:
            cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[slot]
    if isinstance(layer, PackedLayer):
        return layer
    if type(layer) is not DynamicLayer or layer.get_seq_length():
        raise KernelError(
            f"the pruned cache grows in the place of a DynamicLayer that is empty, and a "
            f"{type(layer).__name__} of {layer.get_seq_length()} tokens is there"
        )
    cache.layers[slot] = PackedLayer(keep, window, sinks)
    return cache.layers[slot]


def left_padding_counts(mask: Tensor | None, batch: int, length: int) -> list[int]:
    """Number of padding tokens on the left of each sequence, by the mask of the newest query.

    mask   [b, 1, t, s], True or 0.0 where it may look, or None. Raises KernelError on any other mask.
    """
    if mask is None:
        return [0] * batch
    newest = mask[:, 0, -1, :length].expand(batch, -1)
    visible = newest if newest.dtype == torch.bool else newest >= 0
    pads = (length - visible.sum(-1)).tolist()
    for row, pad in zip(visible, pads, strict=True):
        if mask.shape[1] != 1 or pad == length or not row[pad:].all():
            raise KernelError("the pruned cache knows padding on the left, and a mask hides other tokens")
    return pads


def append_and_attend_per_token(
    layer: PackedLayer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attention of tokens that come after others: one by one, as each sees what the ones before it left."""
    if not layer.is_padded_like(left_padding_counts(mask, len(q), layer.length + q.shape[2])) and mask is not None:
        raise KernelError("sequences in the pruned cache are padded otherwise than they were at first")
    each = [slice(i, i + 1) for i in range(q.shape[2])]
    steps = [layer.append_and_attend(q[:, :, one], k[:, :, one], v[:, :, one], scale) for one in each]
    return steps[0] if len(steps) == 1 else torch.cat(steps, 1)

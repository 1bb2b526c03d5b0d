"""Cache slot of each layer, and the config's entries per layer.

`cache.get_seq_length()` looks at slot 0, masks look at the first slot of their kind. If the attention of such
a layer is gone the slot stays empty and decoding goes wrong without an error, so live layers move into it.
"""

from dataclasses import dataclass
from typing import Any

UNIFORM = "attention"
_PREFERRED = "full_attention"
_STATES = frozenset({"linear_attention", "conv", "mamba"})  # slots that keep a state, not keys and values
_BOTH = frozenset({"hybrid", "hybrid_sliding"})
_PER_LAYER = ("layer", "block", "pattern")


@dataclass(frozen=True)
class Slots:
    """slots: layer position -> cache slot. kinds: what the config must say of each slot and position."""

    slots: tuple[int, ...]
    kinds: tuple[str, ...]


def assign_cache_slots(
    cache_kinds: tuple[str, ...],
    uses_cache: tuple[bool, ...],
    is_attention: tuple[bool, ...] = (),
    reads_keys: tuple[bool, ...] = (),
) -> Slots:
    """Slots for the layers that use the cache (`uses_cache`), given what kind of cache each layer has.

    `is_attention` says which of them keep keys and values: a slot that has both may have lost its attention alone.
    `reads_keys` says which read keys, those of a layer before them perhaps: they keep their kind as live ones do.

    A live layer keeps its position's kind, because the model's own forward picks masks by position. The kind
    at a dead position is free, and so is its slot: the first live layer moves to slot 0, and every other dead
    position takes the kind of slot 0, so that no kind's first slot is an empty one.
    """
    if not (_STATES | _BOTH).isdisjoint(cache_kinds):
        return Slots(_assign_within_kinds(cache_kinds, uses_cache, is_attention or uses_cache), cache_kinds)
    slots = list(range(len(cache_kinds)))
    if not any(uses_cache) or all(uses_cache):
        return Slots(tuple(slots), cache_kinds)
    if not uses_cache[0]:
        alive = [i for i, used in enumerate(uses_cache) if used]
        mover = next((i for i in alive if cache_kinds[i] == _PREFERRED), alive[0])
        slots[0], slots[mover] = mover, 0
        cache_kinds = (cache_kinds[mover], *cache_kinds[1:])
    bound = [used or (bool(reads_keys) and reads_keys[i]) for i, used in enumerate(uses_cache)]
    return Slots(
        tuple(slots), tuple(kind if bound[i] or i == 0 else cache_kinds[0] for i, kind in enumerate(cache_kinds))
    )


def _assign_within_kinds(
    cache_kinds: tuple[str, ...], uses_cache: tuple[bool, ...], is_attention: tuple[bool, ...]
) -> tuple[int, ...]:
    """Slots of a model with states: a slot is made for one kind of cache, so layers change places within theirs.

    The cache asks its first attention slot how long it is, and its last state slot whether it has begun.
    """
    slots = list(range(len(cache_kinds)))
    for kind in dict.fromkeys(cache_kinds):
        layers = [i for i, k in enumerate(cache_kinds) if k == kind]
        alive = [i for i in layers if (is_attention[i] if kind in _BOTH else uses_cache[i])]
        probe = -1 if kind in _STATES else 0
        if alive and layers[probe] not in alive:
            slots[layers[probe]], slots[alive[probe]] = alive[probe], layers[probe]
    return tuple(slots)


def per_layer_values(config: Any, num_layers: int) -> dict[str, Any]:
    """The config's attributes with one entry per layer: `layer_types`, `no_rope_layers`, pattern strings."""
    values = {}
    for name in sorted(vars(config)):
        value = vars(config)[name]  # what differs between layers is no attribute of the whole
        listed = isinstance(value, (list, tuple, str)) and len(value) == num_layers
        if listed and any(word in name for word in _PER_LAYER):
            values[name] = value
    return values


def without_entry(value: Any, index: int) -> Any:
    """A list, tuple or string without one entry."""
    return value[:index] + value[index + 1 :]


def layer_index_lists(config: Any, num_layers: int) -> dict[str, list[int]]:
    """The config's attributes that list layers by number: `mlp_only_layers`, `full_attn_idxs`."""
    lists = {}
    for name in sorted(vars(config)):
        value = vars(config)[name]
        if (
            isinstance(value, list)
            and len(value) != num_layers
            and name.endswith(("_layers", "_idxs", "_indices"))
            and all(type(i) is int and 0 <= i < num_layers for i in value)
        ):
            lists[name] = value
    return lists


def renumber_after_removal(layer_indices: list[int], removed_index: int) -> list[int]:
    """Layer numbers after one layer is gone."""
    return [i - (i > removed_index) for i in layer_indices if i != removed_index]

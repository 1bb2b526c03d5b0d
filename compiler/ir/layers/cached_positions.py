"""The count of positions that a cache's layer of states keeps, where a kernel moves the states itself.

transformers has such a count from 5.25 on, as a tensor that its own cache methods raise.
"""

from typing import Any


def count_positions(cache: Any, layer_idx: int, positions: int) -> None:
    """Add to the count of a layer whose states were moved beside the cache's own methods."""
    count = getattr(cache.layers[layer_idx], "cumulative_length_linear", None)
    if count is not None:
        count.add_(positions)

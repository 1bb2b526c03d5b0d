"""Clients of different size: each holds a part of every array, and entries that few hold are not shrunk.

Source: HeteroFL, Diao et al. 2021 (arXiv 2010.01264): entries are divided by how many clients hold them. RaFFM's
published code divides by the number of all clients, as if those without an entry had sent zero.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, TypeVar

import numpy as np

from .state import State

# Of one array, the kept indices of each of its axes, ascending; None for all of them.
Index = tuple[np.ndarray | None, ...]
Counted = Literal["all", "holders"]
T = TypeVar("T")


def part_of(whole: State, index: Mapping[str, Index]) -> dict[str, np.ndarray]:
    """What a client of that size holds; arrays without an index are held whole."""
    return {
        name: array[_grid(index[name], array.shape)].copy() if name in index else array.copy()
        for name, array in whole.items()
    }


def _grid(index: Index, shape: Sequence[int]) -> tuple[np.ndarray, ...]:
    return np.ix_(*[np.arange(size) if kept is None else kept for kept, size in zip(index, shape, strict=True)])


def coverage_mean(
    whole: State,
    parts: Mapping[int, State],
    indices: Mapping[int, Mapping[str, Index]],
    weights: Mapping[int, float],
    counted: Counted = "all",
) -> dict[str, np.ndarray]:
    """Every entry moved by what clients changed of it, by their weights; one that nobody holds keeps its value.

    counted   among whom: "holders" of the entry, as HeteroFL has it, so that it follows a client who holds it alone; or
              "all" that sent something, of whom those without the entry leave it as it is
    """
    made, all_of_them = {}, sum(weights[k] for k in parts)
    for name, array in whole.items():
        moved, mass = np.zeros(array.shape), np.zeros(array.shape)
        for k in sorted(parts):
            if weights[k] > 0:
                at = _grid(indices[k].get(name, (None,) * array.ndim), array.shape)
                moved[at] += weights[k] * (parts[k][name].astype(np.float64) - array[at])
                mass[at] += weights[k]
        among = np.full(array.shape, all_of_them) if counted == "all" else mass
        made[name] = (array + np.where(mass > 0, moved / np.where(mass > 0, among, 1.0), 0.0)).astype(array.dtype)
    return made


def heads_prefix(heads: int, width: int, keep: int) -> np.ndarray:
    """Indices of the first `keep` of the `width` channels of every head, in an array that lies head by head."""
    return (np.arange(heads)[:, None] * width + np.arange(keep)[None]).ravel()


def sandwich(
    clients: Sequence[int],
    options: Sequence[T],
    seed: int | Sequence[int],
    most: Mapping[int, int] = MappingProxyType({}),
) -> dict[int, T]:
    """One client trains the largest of the options (the first), one the smallest (the last), the others draw.

    Which client does what follows from the seed; give another one every round.

    most    client -> place of the largest option that it can afford; one that is missing affords all. The largest goes
            to one of those who afford most
    """
    draw = np.random.default_rng(seed)
    order = [clients[i] for i in draw.permutation(len(clients))]
    able = min(order, key=lambda k: most.get(k, 0))  # the first of those who afford most
    chosen = {able: options[most.get(able, 0)]}
    for place, client in enumerate(k for k in order if k != able):
        drawn = int(draw.integers(most.get(client, 0), len(options)))
        chosen[client] = options[drawn if place else -1]
    return chosen

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
CountMode = Literal["all", "holders"]
T = TypeVar("T")


def slice_state(state: State, index: Mapping[str, Index]) -> dict[str, np.ndarray]:
    """Part of a state that a client of that size has; arrays without an index are held whole."""
    return {
        name: array[_numpy_index(index[name], array.shape)].copy() if name in index else array.copy()
        for name, array in state.items()
    }


def _numpy_index(index: Index, shape: Sequence[int]) -> tuple[np.ndarray | slice, ...]:
    """NumPy's index of what is kept. Slices of whole axes are several times as fast as all of their numbers."""
    if sum(axis_index is not None for axis_index in index) < 2:
        return tuple(slice(None) if axis_index is None else axis_index for axis_index in index)
    return np.ix_(
        *[np.arange(size) if axis_index is None else axis_index for axis_index, size in zip(index, shape, strict=True)]
    )


def coverage_mean(
    global_state: State,
    client_states: Mapping[int, State],
    client_indices: Mapping[int, Mapping[str, Index]],
    weights: Mapping[int, float],
    denominator: CountMode = "all",
) -> dict[str, np.ndarray]:
    """Average the clients' changes entry by entry, weighted, over those who hold the entry; one that nobody holds keeps
    its value.

    denominator   among whom: "holders" of the entry, as HeteroFL has it, so that it follows a client who holds it
                alone; or "all" that sent something, of whom those without the entry leave it as it is
    """
    result, all_of_them = {}, sum(weights[k] for k in client_states)
    for name, array in global_state.items():
        change, mass = np.zeros(array.shape), np.zeros(array.shape)
        for k in sorted(client_states):
            if weights[k] > 0:
                at = _numpy_index(client_indices[k].get(name, (None,) * array.ndim), array.shape)
                change[at] += weights[k] * (client_states[k][name].astype(np.float64) - array[at])
                mass[at] += weights[k]
        among = np.full(array.shape, all_of_them) if denominator == "all" else mass
        result[name] = (array + np.where(mass > 0, change / np.where(mass > 0, among, 1.0), 0.0)).astype(array.dtype)
    return result


def assign_sandwich_sizes(
    clients: Sequence[int],
    sizes_by_falling_cost: Sequence[T],
    seed: int | Sequence[int],
    first_affordable: Mapping[int, int] = MappingProxyType({}),
) -> dict[int, T]:
    """Assign sizes to clients: one trains the largest size (the first), one the smallest (the last), the
    others draw.

    Which client does what follows from the seed; give another one every round.

    first_affordable   client -> index of the largest option that it can afford; one that is missing affords all.
                    The largest goes to one of those who afford most
    """
    draw = np.random.default_rng(seed)
    order = [clients[i] for i in draw.permutation(len(clients))]
    able = min(order, key=lambda k: first_affordable.get(k, 0))  # the first of those who afford most
    chosen = {able: sizes_by_falling_cost[first_affordable.get(able, 0)]}
    for position, client in enumerate(k for k in order if k != able):
        option = int(draw.integers(first_affordable.get(client, 0), len(sizes_by_falling_cost)))
        chosen[client] = sizes_by_falling_cost[option if position else -1]
    return chosen

"""Clients of different size: each holds a part of every array, and entries count as often as they are held.

Source: HeteroFL, Diao et al. 2021 (arXiv 2010.01264): entries are divided by how many clients hold them. RaFFM's
published code divides by the number of all clients, which shrinks what few hold.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from .state import State

# Of one array, the kept indices of each of its axes, ascending; None for all of them.
Index = tuple[np.ndarray | None, ...]
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
    whole: State, parts: Mapping[int, State], indices: Mapping[int, Mapping[str, Index]], weights: Mapping[int, float]
) -> dict[str, np.ndarray]:
    """Every entry is the weighted mean over the clients that hold it; one that nobody holds keeps its value."""
    made = {}
    for name, array in whole.items():
        sums, mass = np.zeros(array.shape), np.zeros(array.shape)
        for k in sorted(parts):
            if weights[k] > 0:
                at = _grid(indices[k].get(name, (None,) * array.ndim), array.shape)
                sums[at] += weights[k] * parts[k][name].astype(np.float64)
                mass[at] += weights[k]
        made[name] = np.where(mass > 0, sums / np.where(mass > 0, mass, 1.0), array).astype(array.dtype)
    return made


def heads_prefix(heads: int, width: int, keep: int) -> np.ndarray:
    """Indices of the first `keep` of the `width` channels of every head, in an array that lies head by head."""
    return (np.arange(heads)[:, None] * width + np.arange(keep)[None]).ravel()


def largest(options: Sequence[T], cost: Callable[[T], float], budget: float) -> T | None:
    """The option of largest cost within the budget, the first of equal ones; None where none fits."""
    fitting = [(cost(option), -place) for place, option in enumerate(options) if cost(option) <= budget]
    return options[-max(fitting)[1]] if fitting else None


def sandwich(clients: Sequence[int], options: Sequence[T], seed: int) -> dict[int, T]:
    """One client trains the largest of the options (the first), one the smallest (the last), the others draw.

    Which client does what follows from the seed; give another one every round.
    """
    draw = np.random.default_rng(seed)
    order = [clients[i] for i in draw.permutation(len(clients))]
    chosen = [options[0], options[-1]][: len(order)]
    chosen += [options[i] for i in draw.integers(len(options), size=len(order) - len(chosen))]
    return dict(zip(order, chosen, strict=True))

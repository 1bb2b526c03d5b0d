"""State of a client: arrays by name, and their weighted mean.

All of these functions work in float64 and give back the type that they were given. Clients are added in the order
of their numbers, so that the order in which replies came in changes no bit of a result.
"""

from collections.abc import Mapping
from math import prod

import numpy as np

State = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]
LARGEST = 1e9  # magnitude of a number: squares and products of adapters then stay far inside of float32


def shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in state.items()}


def n_bytes_of_state(state: State) -> int:
    """Bytes of the arrays alone, without framing."""
    return sum(array.nbytes for array in state.values())


def value_count(state: State | Shapes) -> int:
    """Number of values in a state."""
    return sum(prod(value if isinstance(value, tuple) else value.shape) for value in state.values())


def state_fault(state: State, expected: Shapes) -> str:
    """Why a state can't be used, as a sentence; "" where it can."""
    if missing := sorted(expected.keys() - state.keys()):
        return f"`{missing[0]}` is missing"
    if surplus := sorted(state.keys() - expected.keys()):
        return f"`{surplus[0]}` was not asked for"
    for name in sorted(expected):
        array = state[name]
        if array.shape != tuple(expected[name]):
            return f"`{name}` is {array.shape}, not {tuple(expected[name])}"
        if reason := value_fault(name, array):
            return reason
    return ""


def value_fault(name: str, array: np.ndarray) -> str:
    """Why the numbers of an array can't be used; "" where they can: float32, and products of two stay finite."""
    if array.dtype != np.float32:
        return f"`{name}` holds {array.dtype}, not float32"
    if not np.isfinite(array).all():
        return f"`{name}` holds NaN or infinity"
    if array.size and np.abs(array).max() > LARGEST:
        return f"`{name}` holds a number above {LARGEST:g}"
    return ""


def weighted_sum(states: Mapping[int, State], shares: Mapping[int, float]) -> dict[str, np.ndarray]:
    """The sum of share * state over the clients that have a share."""
    chosen = [k for k in sorted(states) if shares.get(k)]
    assert chosen, "no client has a share"
    first = states[chosen[0]]
    return {
        name: sum(shares[k] * states[k][name].astype(np.float64) for k in chosen).astype(first[name].dtype)
        for name in first
    }


def normalized_weights(weights: Mapping[int, float]) -> dict[int, float]:
    """The weights divided by their sum; clients of weight 0 are left out."""
    mass = sum(weights[k] for k in sorted(weights))
    return {k: weights[k] / mass for k in sorted(weights) if weights[k] > 0}


def mean(states: Mapping[int, State], weights: Mapping[int, float]) -> dict[str, np.ndarray]:
    """The weighted mean: FedAvg, and FedIT where the states are the factors of adapters.

    Source: McMahan et al. 2017 (arXiv 1602.05629); FedIT, Zhang et al. 2023 (arXiv 2305.05644).
    """
    return weighted_sum(states, normalized_weights(weights))


def flat_float64(state: State) -> np.ndarray:
    """All numbers of a state, by name, as one float64 vector."""
    return np.concatenate([state[name].astype(np.float64).ravel() for name in sorted(state)])

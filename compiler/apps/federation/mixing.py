"""Mixing ratio of the others' aggregate at a client: a fixed share, or the one that its validation likes best."""

from collections.abc import Callable

import numpy as np

from .rotations import Way, weighted_intervention_mean
from .state import State

GRID = (0.1, 0.3, 0.5, 0.7, 1.0)  # shares that are tried beside 0


def mix(
    local: State, aggregate: State, aggregate_share: float, personalisation: Way = "align"
) -> dict[str, np.ndarray]:
    """(1 - share) * own + share * others, with R orthonormal: 0 is the client's own state, 1 the others'."""
    if aggregate_share == 0:
        return dict(local)
    return weighted_intervention_mean(
        {0: local, 1: aggregate}, {0: 1 - aggregate_share, 1: aggregate_share}, local, personalisation
    )


def best_mix(
    local: State, aggregate: State, validation_loss: Callable[[State], float], way: Way = "align"
) -> tuple[float, dict[str, np.ndarray]]:
    """The share of least loss, and the state mixed so; the smallest of equal ones. 0 is always tried, so that
    no client is worse off, on the rows that `validation_loss` is of, than if it had stayed alone."""
    best = (validation_loss(local), 0.0, dict(local))
    for share in GRID:
        state = mix(local, aggregate, share, way)
        value = validation_loss(state)
        if value < best[0]:
            best = (value, share, state)
    return best[1], best[2]

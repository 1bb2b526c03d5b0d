"""Differential privacy of clients: each one's influence on a result is clipped, and noise hides it.

Source: DP-FedAvg, McMahan et al. 2018 (arXiv 1710.06963): uniform weights, clipped changes, Gaussian noise.
"""

from collections.abc import Mapping, Sequence
from math import lgamma, log, log1p
from typing import TYPE_CHECKING

import numpy as np

from .history import Round
from .state import State, flat_float64

if TYPE_CHECKING:
    from .declaration import Declaration


def clip_update_norm(state: State, global_state: State, max_norm: float) -> dict[str, np.ndarray]:
    """The state with its change, as one vector, shortened to that length where it is longer."""
    change = {name: array.astype(np.float64) - global_state[name] for name, array in state.items()}
    length = float(np.linalg.norm(flat_float64(change)))
    factor = min(1.0, max_norm / length) if length > 0 else 1.0
    return {name: (global_state[name] + factor * change[name]).astype(state[name].dtype) for name in state}


def noisy_mean(
    states: Mapping[int, State], global_state: State, clip_norm: float, noise_multiplier: float, seed: int | None = None
) -> dict[str, np.ndarray]:
    """The mean of the clipped states, all clients alike, with normal noise of deviation multiplier * norm / clients.

    A seed makes a test repeatable and the noise worthless: whoever knows it takes the noise off. Without one it
    comes from the system.
    """
    clipped_states = {k: clip_update_norm(state, global_state, clip_norm) for k, state in states.items()}
    draw = np.random.default_rng(seed)
    deviation = noise_multiplier * clip_norm / len(clipped_states)
    return {
        name: (
            sum(clipped_states[k][name].astype(np.float64) for k in sorted(clipped_states)) / len(clipped_states)
            + deviation * draw.standard_normal(array.shape)
        ).astype(array.dtype)
        for name, array in sorted(global_state.items())
    }


def privacy_sentence(rounds: Sequence[Round], declaration: "Declaration") -> str:
    """The epsilon that was spent, as a sentence: of a client, or of a row of the client that has fewest."""
    if not declaration.noise:
        return "changes are bounded and no noise hides them: epsilon is infinite"
    if declaration.protects == "clients":
        spent = client_epsilon(len(rounds), declaration.noise, declaration.delta)
        return f"epsilon {spent:.2f} at delta {declaration.delta:g} for a client, with fresh noise each round"
    fewest = min(result.examples for round_ in rounds for result in round_.updates.values())
    share = min(1.0, declaration.batch / fewest)
    spent = row_epsilon(len(rounds) * declaration.steps, share, declaration.noise, declaration.delta)
    return f"epsilon {spent:.2f} at delta {declaration.delta:g} for a row of a client with {fewest:.0f}, at most"


def client_epsilon(rounds: int, noise_multiplier: float, delta: float) -> float:
    """The epsilon of that many rounds for a client that takes part in every one (no gain from sampling).

    Rényi differential privacy of the Gaussian mechanism, adjacency by adding or removing a client: order a costs
    a / (2 multiplier^2) a round; the best of many orders is converted.
    Source: Mironov 2017 (arXiv 1702.07476); conversion of Canonne, Kamath and Steinke 2020 (arXiv 2004.00010).
    """
    if noise_multiplier <= 0:
        return float("inf")
    orders = np.concatenate([np.linspace(1.01, 20, 2000), np.arange(20.5, 2000, 0.5)])
    spent = rounds * orders / (2 * noise_multiplier**2)
    converted = spent + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    return float(max(converted.min(), 0.0))


def row_epsilon(steps: int, sampling_rate: float, noise_multiplier: float, delta: float) -> float:
    """Epsilon of a row of a client after so many steps, each of rows drawn one by one, at `sampling_rate`.

    Rényi differential privacy of the Poisson-sampled Gaussian mechanism at integer orders, adjacency by adding or
    removing a row.
    Source: Mironov, Talwar and Zhang 2019 (arXiv 1908.10530), section 3.3; conversion as in `client_epsilon`.
    """
    if noise_multiplier <= 0:
        return float("inf")
    best = float("inf")
    for order in range(2, 257):
        k = np.arange(order + 1)
        ways = np.array([lgamma(order + 1) - lgamma(i + 1) - lgamma(order - i + 1) for i in k])
        left = np.where(k < order, (order - k) * log1p(-min(sampling_rate, 1 - 1e-15)), 0.0)  # of 0 rows left: log 1
        terms = ways + k * log(sampling_rate) + left + (k * k - k) / (2 * noise_multiplier**2)
        largest_term = terms.max()
        spent = steps * (largest_term + log(np.exp(terms - largest_term).sum())) / (order - 1)
        best = min(best, spent + log1p(-1 / order) - log(delta * order) / (order - 1))
    return max(best, 0.0)

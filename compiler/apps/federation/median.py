"""The geometric median, as shares of the points: what a few outliers can't pull away.

Weiszfeld's iterates stay weighted means of the points. So the points themselves are never touched: all that is
needed is their Gram matrix, and the answer is a share for each of them.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from .state import State, flat_float64

STEPS, TOLERANCE = 1000, 1e-12


def centered_gram(states: Mapping[int, State]) -> np.ndarray:
    """Inner products of the states, sorted by client, [k, k], around their median by coordinate.

    Distances are differences of such products; around a point amid most states, an outlier a million times as far
    away costs the distances of the others no digits.
    """
    points = np.stack([flat_float64(states[k]) for k in sorted(states)])  # [k, d]
    points -= np.median(points, axis=0)
    return points @ points.T


def geometric_median_shares(gram_matrix: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Shares [k], sum 1, of the point that minimises the weighted sum of distances to k points.

    gram_matrix   their Gram matrix [k, k] around any origin
    weights       [k], at least 0 and not all 0

    Where the point arrives at one of the given ones, Vardi and Zhang's step says whether that is the answer or how
    to leave it. Two points of equal weight have no unique median; the mean of them is given.
    Source: Weiszfeld 1937; Vardi and Zhang 2000, "The multivariate L1-median and associated data depth".
    """
    weights = weights / weights.sum()
    shares = weights.copy()
    norms = np.sqrt(np.maximum(np.diag(gram_matrix), 0.0))
    scale = float(np.median(norms)) or float(norms.max())  # of most points, not of an outlier
    for _ in range(STEPS):
        distance = _distances_from_gram(gram_matrix, shares)
        coincident = distance <= 1e-9 * scale  # coincident with where we are
        pull = np.where(coincident, 0.0, weights / np.where(coincident, 1.0, distance))
        if not pull.any():
            return shares  # all points that count are here
        step = pull / pull.sum()
        if coincident.any():
            # The pull of the others, a vector of length |R|, against the weight of what lies here.
            force = _norm_from_gram(gram_matrix, step - shares) * pull.sum()
            stay = min(1.0, weights[coincident].sum() / force) if force > 0 else 1.0
            if stay >= 1.0:
                return shares
            step = (1 - stay) * step + stay * shares
        step_length = _norm_from_gram(gram_matrix, step - shares)
        shares = step
        if step_length <= TOLERANCE * scale:
            break
    return shares


def _distances_from_gram(products: np.ndarray, shares: np.ndarray) -> np.ndarray:
    cross = products @ shares
    return np.sqrt(np.maximum(np.diag(products) - 2 * cross + shares @ cross, 0.0))


def _norm_from_gram(products: np.ndarray, direction: np.ndarray) -> float:
    return float(np.sqrt(max(direction @ products @ direction, 0.0)))


def geometric_median_weights(states: Mapping[int, State], weights: Mapping[int, float]) -> dict[int, float]:
    """The weight of each of many states in their common geometric median: its own over its distance from there.

    Time and memory grow with their number alone. A distance counts as at least 1e-9 of the median one, so that a point
    that is the median itself does not take all.
    Source: smoothed Weiszfeld iterates, Pillutla et al. 2022 (arXiv 1912.13445).
    """
    order = [k for k in sorted(states) if weights[k] > 0]
    mass = np.array([weights[k] for k in order])
    pull = mass / mass.sum()
    center = _weighted_sum_of_vectors(states, order, pull)
    for _ in range(STEPS):
        away = np.concatenate(
            [np.linalg.norm(block - center, axis=1) for _, block in _stacked_vector_blocks(states, order)]
        )
        scale = float(np.median(away))
        pull = mass / np.maximum(away, 1e-9 * scale or 1.0)
        next_center = _weighted_sum_of_vectors(states, order, pull / pull.sum())
        step, center = float(np.linalg.norm(next_center - center)), next_center
        if step <= 1e-7 * scale:
            break
    return dict(zip(order, (pull / pull.sum()).tolist(), strict=True))


def _weighted_sum_of_vectors(states: Mapping[int, State], order: list[int], shares: np.ndarray) -> np.ndarray:
    return sum((shares[at] @ block for at, block in _stacked_vector_blocks(states, order)), np.zeros(()))


def _stacked_vector_blocks(states: Mapping[int, State], order: list[int]) -> Iterator[tuple[slice, np.ndarray]]:
    """Some states at a time as rows [k, d] of float64, and where they are in the order."""
    for start in range(0, len(order), 256):
        some = order[start : start + 256]
        yield slice(start, start + len(some)), np.stack([flat_float64(states[k]) for k in some])

"""All-But-Me: what each client gets is put together from what the others sent.

Source: FedReFT, Siddika et al. 2025 (arXiv 2508.20295); the abstract gives words, the formulas are ours.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from .median import geometric_median_shares

Center = Literal["mean", "median"]


def leave_one_out_shares(
    weights: Mapping[int, float], gram_matrix: np.ndarray | None = None
) -> dict[int, dict[int, float]]:
    """For every client the share of every other one, sum 1; empty for one that has no others.

    weights       of the clients; one of weight 0 has no part in what others get
    gram_matrix   their Gram matrix, sorted by client: then the geometric median of the others, else their mean
    """
    order = sorted(weights)
    mass = np.array([weights[k] for k in order], dtype=np.float64)
    result: dict[int, dict[int, float]] = {}
    for index, k in enumerate(order):
        rest_mass = mass.copy()
        rest_mass[index] = 0.0
        if rest_mass.sum() <= 0:
            result[k] = {}
            continue
        used = np.flatnonzero(rest_mass)
        shares = rest_mass[used] / rest_mass.sum()
        if gram_matrix is not None and len(used) > 2:
            shares = geometric_median_shares(gram_matrix[np.ix_(used, used)], rest_mass[used])
        elif gram_matrix is not None:
            shares = _median_of_one_or_two(rest_mass[used])
        result[k] = {order[i]: float(share) for i, share in zip(used, shares, strict=True)}
    return result


def _median_of_one_or_two(weights: np.ndarray) -> np.ndarray:
    """The median of one or two points: the heavier, or their mean where neither is."""
    heavy = weights == weights.max()
    return heavy / heavy.sum()

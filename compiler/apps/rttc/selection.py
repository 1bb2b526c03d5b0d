"""Selection of samples for a query: the nearest, or those that are most informative together."""

from collections.abc import Callable

import torch
from torch import Tensor

POOL = 256  # nearest vectors that a diverse selection chooses from

Selection = Callable[[Tensor, Tensor, int], list[int]]


def nearest_indices(query: Tensor, vectors: Tensor, count: int) -> list[int]:
    """The rows of vectors [n, d] with the largest inner products with query [d]; the first of equals."""
    scores = vectors @ query
    least = scores.topk(min(count, len(scores))).values[-1]
    candidates = (scores >= least).nonzero()[:, 0]  # few: all of them are sorted in a blink
    return candidates[torch.sort(scores[candidates], descending=True, stable=True).indices[:count]].tolist()


def select_by_posterior_variance(query: Tensor, vectors: Tensor, count: int, noise: float = 0.01) -> list[int]:
    """Rows that lower the posterior variance at the query fastest: a copy of what is known tells little more.

    query    [d] unit vector; vectors [n, d] unit vectors, as a linear kernel of a Gaussian process
    noise    variance of an observation; small: no row is wanted twice; large: the nearest are taken
    Source: SIFT, Hübotter et al. 2025 (arXiv 2410.08020), equation 5, greedy as in its algorithm 1.
    """
    pool = nearest_indices(query, vectors, max(count, POOL))
    points = torch.cat([query[None], vectors[pool]]).double()  # [1 + pool, d]
    covariance = points @ points.T
    chosen: list[int] = []
    for _ in range(min(count, len(pool))):
        gain = covariance[0] ** 2 / (covariance.diagonal() + noise)
        gain[[0, *chosen]] = -torch.inf
        best = int(gain.argmax())
        chosen.append(best)
        column = covariance[:, best]
        covariance = covariance - torch.outer(column, column) / (column[best] + noise)
    return [pool[at - 1] for at in chosen]


SELECTIONS: dict[str, Selection] = {"nearest": nearest_indices, "diverse": select_by_posterior_variance}

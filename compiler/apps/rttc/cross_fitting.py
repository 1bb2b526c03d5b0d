"""Cross-fitting: each dev question is judged by a policy that was fitted on the questions of other folds."""

from collections.abc import Callable, Iterator, Sequence

import torch

from .policy import Point, SimulatedQuery, Trial, mean_point

FOLDS = 5


def cross_fitting_folds(n_rows: int, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Pairs of rows to fit on and rows held out; each of `n_rows` rows is held out once. Of a single row the first list
    is empty."""
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))
    for part in order.chunk(min(FOLDS, n_rows)):
        validation = part.tolist()
        yield sorted(set(range(n_rows)) - set(validation)), validation


def cross_fitted(
    fitted: Point, trials: Sequence[Trial], fit: Callable[[Sequence[int]], Callable[[int], SimulatedQuery]], seed: int
) -> Point:
    """Accuracy, seconds and shares of questions held out, beside the thresholds of `fitted`, which is of all questions.

    fit    on some questions; what it returns answers any question
    """
    queries: dict[int, SimulatedQuery] = {}
    for training, validation in cross_fitting_folds(len(trials), seed):
        if not training:
            return fitted  # of one question nothing can be held out
        answer = fit(training)
        queries |= {row: answer(row) for row in validation}
    ordered = [queries[row] for row in range(len(trials))]
    return mean_point(trials, ordered, fitted.direct, fitted.rag, fitted.scaled)

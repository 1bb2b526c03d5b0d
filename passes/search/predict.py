"""Let a model of few evaluations say which choices of a family are worth one."""

import math
import random

import torch

from ...compiler.plugin.interfaces import param
from ...compiler.transforms.supernet.explorer import Explorer, Genome, Values, neighbours, non_dominated
from ...compiler.transforms.supernet.search_pass import (
    Method,
    evaluate_extremes_and_proposals,
    sample_allowed_genome,
    value_counts_by_dim,
)

RIDGE = 0.1  # of standardised measures


class Predict(Method):
    """Let a model of few evaluations say which choices of a family are worth one.

    A third of the evaluations are the ends and draws. Then, again and again, a ridge regression over the dimensions'
    values foretells the measures of draws and of neighbours of the front, and of those that nothing foretold beats
    one is evaluated.

    The result is a front of choices that no other one evaluated beats in all measures. Counts and bytes are worked
    out; a latency comes from a table that is measured here, whose error is told. `report` is measured of the
    front's choices alone. Every value is kept as soon as it is known, so that a killed search goes on to the same
    front.

    Source: predictor-guided search as in Once-for-all (Cai et al. 2020, arXiv 1908.09791), section 3.4; ridge
    regression: own choice.
    Example: sizes = search.predict(measure: [perplexity(calib), params], evals: 12)
    """

    evals: int = param("Choices that are evaluated, at most.", default=60, ge=1, unit="choices")
    pool: int = param("Choices that are foretold for each that is evaluated.", default=200, ge=1, unit="choices")

    def explore(self, explorer: Explorer, rng: random.Random) -> None:
        def propose() -> Genome:
            early = len(explorer.known) < max(self.evals // 3, 3)
            return sample_allowed_genome(explorer, rng) if early else self._draw_promising_new_candidate(explorer, rng)

        evaluate_extremes_and_proposals(explorer, rng, propose)

    def _draw_promising_new_candidate(self, explorer: Explorer, rng: random.Random) -> Genome:
        front = explorer.pareto_front()
        pool = {g for one in front for g in neighbours(one, value_counts_by_dim(explorer))}
        pool |= {tuple(rng.randrange(size) for size in value_counts_by_dim(explorer)) for _ in range(self.pool)}
        fresh = sorted(g for g in pool if g not in explorer.known and explorer.allows(g))
        if not fresh:
            return sample_allowed_genome(explorer, rng)
        predicted = fit_and_predict_measures(explorer, fresh)
        among = {genome: explorer.known[genome] for genome in front} | predicted
        better = [genome for genome in non_dominated(among) if genome in predicted]
        return rng.choice(better or fresh)


def fit_and_predict_measures(explorer: Explorer, genomes: list[Genome]) -> dict[Genome, Values]:
    """The measures of genomes by ridge regression over which value each dimension has, from what was evaluated."""
    known = {g: v for g, v in explorer.known.items() if all(map(math.isfinite, v))}
    x, y = _one_hot(list(known), value_counts_by_dim(explorer)), torch.tensor(list(known.values()), dtype=torch.float64)
    middle, spread = y.mean(0), y.std(0, unbiased=False).clamp_min(1e-12)
    gram = x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, x.T @ ((y - middle) / spread))
    predicted = _one_hot(genomes, value_counts_by_dim(explorer)) @ weights * spread + middle
    return {genome: tuple(row) for genome, row in zip(genomes, predicted.tolist(), strict=True)}


def _one_hot(genomes: list[Genome], widths: list[int]) -> torch.Tensor:
    """[n, sum of widths]"""
    indices = torch.tensor(genomes)
    columns = [torch.nn.functional.one_hot(indices[:, i], width) for i, width in enumerate(widths)]
    return torch.cat(columns, 1).double()

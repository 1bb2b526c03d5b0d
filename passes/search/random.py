"""Evaluate choices of a family that are drawn at random."""

import random

from ...compiler.transforms.supernet.explorer import Explorer
from ...compiler.transforms.supernet.search_pass import Method, evaluate_extremes_and_proposals, sample_allowed_genome


class Random(Method):
    """Evaluate choices of a family that are drawn at random.

    The largest, the middle and the smallest choice come first, then draws in which every value of a dimension is as
    likely as the others.

    The result is a front of choices that no other one evaluated beats in all measures. Counts and bytes are worked
    out; a latency comes from a table that is measured here, whose error is told. `report` is measured of the
    front's choices alone. Every value is kept as soon as it is known, so that a killed search goes on to the same
    front.

    Source: the baseline of Bergstra and Bengio 2012 (JMLR 13).
    Example: sizes = search.random(measure: [perplexity(calib), params], evals: 12)
    """

    def explore(self, explorer: Explorer, rng: random.Random) -> None:
        evaluate_extremes_and_proposals(explorer, rng, lambda: sample_allowed_genome(explorer, rng))

"""Climb from choices of a family to better neighbours."""

import random

from ...compiler.transforms.supernet.explorer import Explorer, Genome, neighbours
from ...compiler.transforms.supernet.search_pass import (
    Method,
    evaluate_extremes_and_proposals,
    sample_allowed_genome,
    value_counts_by_dim,
)


class Hill(Method):
    """Climb from choices of a family to better neighbours.

    A neighbour is one step away in one dimension. From the largest, the middle and the smallest choice on, a neighbour
    that was not evaluated is tried of a choice that is on the front; where none has any left, one is drawn.

    The result is a front of choices that no other one evaluated beats in all measures. Counts and bytes are worked
    out; a latency comes from a table that is measured here, whose error is told. `report` is measured of the
    front's choices alone. Every value is kept as soon as it is known, so that a killed search goes on to the same
    front.

    Source: Pareto local search, Paquete et al. 2004; hill climbing from the heuristic choice as in Shears (Munoz
    et al. 2024, arXiv 2404.10934).
    Example: sizes = search.hill(measure: [perplexity(calib), params], evals: 12)
    """

    def explore(self, explorer: Explorer, rng: random.Random) -> None:
        evaluate_extremes_and_proposals(explorer, rng, lambda: self._draw_new_neighbour_of_front(explorer, rng))

    def _draw_new_neighbour_of_front(self, explorer: Explorer, rng: random.Random) -> Genome:
        front = explorer.pareto_front()
        rng.shuffle(front)
        for genome in front:
            fresh = [
                g
                for g in neighbours(genome, value_counts_by_dim(explorer))
                if g not in explorer.known and explorer.allows(g)
            ]
            if fresh:
                return rng.choice(fresh)
        return sample_allowed_genome(explorer, rng)

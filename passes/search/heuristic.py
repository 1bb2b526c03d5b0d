"""Evaluate the few choices of a family that training speaks for."""

import random
from collections import Counter

from ...compiler.plugin.interfaces import param
from ...compiler.transforms.supernet.explorer import Explorer, Genome
from ...compiler.transforms.supernet.search_pass import Method, value_counts_by_dim


class Heuristic(Method):
    """Evaluate the few choices of a family that training speaks for.

    They are the middle choice, the values that were drawn most often, and those of the lowest loss that training
    recorded, as many as `evals` lets; a family that was not trained has the middle alone. Where `at_most` refuses
    one it is made smaller, one dimension at a time.

    The result is a front of choices that no other one evaluated beats in all measures. Counts and bytes are worked
    out; a latency comes from a table that is measured here, whose error is told. `report` is measured of the
    front's choices alone. Every value is kept as soon as it is known, so that a killed search goes on to the same
    front.

    Source: the heuristics of Shears and of the NLS example of NNCF (Munoz et al. 2024, arXiv 2404.10934).
    Example: sizes = search.heuristic(measure: [perplexity(calib), params])
    """

    determinism = "deterministic"

    evals: int = param("Choices that are evaluated, at most.", default=8, ge=1, unit="choices")

    def explore(self, explorer: Explorer, rng: random.Random) -> None:
        space, losses = explorer.space, explorer.family.losses
        loss_history: dict[Genome, list[float]] = {}
        for choice, loss in losses:
            loss_history.setdefault(space.genome(choice), []).append(loss)
        lowest = sorted(
            loss_history, key=lambda genome: (sum(loss_history[genome]) / len(loss_history[genome]), genome)
        )
        often = [
            Counter(genome[i] for genome in loss_history for _ in loss_history[genome]).most_common(1)[0][0]
            for i in range(len(space.dims) if loss_history else 0)
        ]
        starts = (space.genome(space.choice("middle")), *([tuple(often)] if often else []), *lowest)
        candidates = list(dict.fromkeys(self._reduce_dims_until_allowed(genome, explorer) for genome in starts))[
            : self.evals
        ]
        explorer.prefetch(candidates)
        for genome in candidates:
            if not explorer.is_exhausted:
                explorer.evaluate(genome)

    def _reduce_dims_until_allowed(self, genome: Genome, explorer: Explorer) -> Genome:
        """The nearest allowed one, each dimension in turn set one value lower."""
        position = 0
        while not explorer.allows(genome):
            if genome[position] < value_counts_by_dim(explorer)[position] - 1:
                genome = (*genome[:position], genome[position] + 1, *genome[position + 1 :])
            position = (position + 1) % len(genome)
        return genome

"""Evaluate the few choices of a family that training speaks for."""

import random
from collections import Counter

from ...compiler.plugin.interfaces import param
from ...compiler.transforms.supernet.explorer import Explorer, Genome
from ...compiler.transforms.supernet.search_pass import Method, sizes


class Heuristic(Method):
    """Evaluate the few choices of a family that training speaks for.

    They are the middle choice, the values that were drawn most often, and those of the lowest loss that training
    recorded, as many as `evals` lets; a family that was not trained has the middle alone. Where `at_most` refuses
    one it is made smaller, dial by dial.

    The result is a front of choices that no other one evaluated beats in all measures. Counts and bytes are worked
    out; a latency comes from a table that is measured here, whose error is told. `report` is measured of the
    front's choices alone. Every value is kept as soon as it is known, so that a killed search goes on to the same
    front.

    Source: the heuristics of Shears and of the NLS example of NNCF (Munoz et al. 2024, arXiv 2404.10934).
    Example: sizes = search.heuristic(measure: [perplexity(calib), params])
    """

    determinism = "deterministic"

    evals: int = param("Choices that are evaluated, at most.", default=8, ge=1, unit="choices")

    def explore(self, explorer: Explorer, chance: random.Random) -> None:
        space, losses = explorer.space, explorer.family.losses
        heard: dict[Genome, list[float]] = {}
        for choice, loss in losses:
            heard.setdefault(space.genome(choice), []).append(loss)
        lowest = sorted(heard, key=lambda genome: (sum(heard[genome]) / len(heard[genome]), genome))
        often = [
            Counter(genome[i] for genome in heard for _ in heard[genome]).most_common(1)[0][0]
            for i in range(len(space.dials) if heard else 0)
        ]
        told = (space.genome(space.choice("middle")), *([tuple(often)] if often else []), *lowest)
        wanted = list(dict.fromkeys(self._smaller(genome, explorer) for genome in told))[: self.evals]
        explorer.expect(wanted)
        for genome in wanted:
            if not explorer.ended:
                explorer.evaluate(genome)

    def _smaller(self, genome: Genome, explorer: Explorer) -> Genome:
        """The nearest allowed one, each dial in turn set one value lower."""
        place = 0
        while not explorer.allows(genome):
            if genome[place] < sizes(explorer)[place] - 1:
                genome = (*genome[:place], genome[place] + 1, *genome[place + 1 :])
            place = (place + 1) % len(genome)
        return genome

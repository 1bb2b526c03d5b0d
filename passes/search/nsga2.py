"""Evolve choices of a family by NSGA-II."""

import random
from typing import ClassVar

from ...compiler.plugin.interfaces import param
from ...compiler.transforms.supernet.explorer import Explorer
from ...compiler.transforms.supernet.genetic import run_nsga2
from ...compiler.transforms.supernet.search_pass import Method


class Nsga2(Method):
    """Evolve choices of a family by NSGA-II.

    Each generation crosses and mutates the choices that few others beat and that lie far apart. A choice beyond
    `at_most` breaks a constraint and is not evaluated.

    The result is a front of choices that no other one evaluated beats in all measures. Counts and bytes are worked
    out; a latency comes from a table that is measured here, whose error is told. `report` is measured of the
    front's choices alone. Every value is kept as soon as it is known, so that a killed search goes on to the same
    front.

    Source: NSGA-II, Deb et al. 2002, as BootstrapNAS uses it (Munoz et al. 2021, arXiv 2112.10878); pymoo (Blank
    and Deb 2020).
    Example: sizes = search.nsga2(measure: [perplexity(calib), params], evals: 12, population: 4)
    """

    extra: ClassVar[str] = "search"
    requires: ClassVar[tuple[str, ...]] = ("pymoo",)

    evals: int = param("Choices that are evaluated, at most.", default=200, ge=1, unit="choices")
    population: int = param("Choices of a generation.", default=20, ge=4, unit="choices")

    def explore(self, explorer: Explorer, rng: random.Random) -> None:
        run_nsga2(explorer, rng, self.population)

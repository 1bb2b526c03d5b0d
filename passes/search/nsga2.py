"""Evolve choices of a family by NSGA-II."""

import random
from typing import ClassVar

from ...compiler.families.explorer import Explorer
from ...compiler.families.genetic import evolve
from ...compiler.families.method import Method
from ...compiler.machine.environment import check_modules
from ...compiler.words.kinds import Lossy, Pass, param
from ...dsl.skeleton import Skeleton
from ...dsl.values import MetricRef, Ratio


class Nsga2(Method, Pass):
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

    keeps = Lossy()
    determinism = "seeded"
    takes = ("family",)
    apart = {"report": "measure"}
    gives = {"": "front"}
    extra: ClassVar[str] = "search"
    requires: ClassVar[tuple[str, ...]] = ("pymoo",)

    measure: list[MetricRef] = param("What choices are good at, the most telling first.", least=1, distinct=True)
    report: list[MetricRef] = param(
        "What is measured of the front alone, on rows not selected by.", default=(), distinct=True
    )
    at_most: Ratio | None = param(
        "The most that a choice may have, as a share of the largest one.",
        of=("params", "flops", "bytes"),
        gt=0,
        le=1,
        default=None,
    )
    evals: int = param("Choices that are evaluated, at most.", default=200, ge=1, unit="choices")
    points: int = param("Choices on the front, at most.", default=8, ge=1, unit="choices")
    population: int = param("Choices of a generation.", default=20, ge=4, unit="choices")

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        """The same shapes. A missing pymoo is said here, before anything is searched."""
        check_modules(self.requires, self.extra, "`search.nsga2`")
        return skeleton

    def explore(self, explorer: Explorer, chance: random.Random) -> None:
        evolve(explorer, chance, self.population)

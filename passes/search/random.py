"""Evaluate choices of a family that are drawn at random."""

import random

from ...compiler.families.explorer import Explorer
from ...compiler.families.method import Method, drawn, pursue
from ...compiler.words.kinds import Lossy, Pass, param
from ...dsl.values import MetricRef, Ratio


class Random(Method, Pass):
    """Evaluate choices of a family that are drawn at random.

    The largest, the middle and the smallest choice come first, then draws in which every value of a dial is as
    likely as the others.

    The result is a front of choices that no other one evaluated beats in all measures. Counts and bytes are worked
    out; a latency comes from a table that is measured here, whose error is told. `report` is measured of the
    front's choices alone. Every value is kept as soon as it is known, so that a killed search goes on to the same
    front.

    Source: the baseline of Bergstra and Bengio 2012 (JMLR 13).
    Example: sizes = search.random(measure: [perplexity(calib), params], evals: 12)
    """

    keeps = Lossy()
    determinism = "seeded"
    takes = ("family",)
    apart = {"report": "measure"}
    gives = {"": "front"}

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
    evals: int = param("Choices that are evaluated, at most.", default=100, ge=1, unit="choices")
    points: int = param("Choices on the front, at most.", default=8, ge=1, unit="choices")

    def explore(self, explorer: Explorer, chance: random.Random) -> None:
        pursue(explorer, lambda: drawn(explorer, chance))

"""Greedy search: cut what hurts the score least, one candidate at a time, until enough is cut."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from ..dsl.diagnostics import Fault, Reject
from .evaluate import not_a_number
from .journal import Journal

if TYPE_CHECKING:
    from .context import Context
    from .kinds import Metric

C = TypeVar("C")

no_finite_score = Fault("no-finite-score", "Every candidate of a search scored NaN or infinity.", exit="failure")


@dataclass(frozen=True)
class Cut(Generic[C]):
    """One decision: what was cut, its score, and the best score that lost."""

    candidate: C
    label: str
    score: float
    runner_up: float | None


@dataclass
class Greedy(Generic[C]):
    """The loop that the pruning passes share.

    candidates()       what could be cut now, in the order that settles ties
    label(c)           a name that tells candidates apart; the journal's key
    score(c)           the model's score with `c` cut
    cut(c)             cut it for good
    enough()           whether to stop
    """

    metric: "Metric"
    candidates: Callable[[], Sequence[C]]
    label: Callable[[C], str]
    score: Callable[[C], float]
    cut: Callable[[C], None]
    enough: Callable[[], bool]

    def run(self, ctx: "Context") -> list[Cut[C]]:
        """Cut until there is enough; every score is in the journal, so a killed run goes on where it was."""
        journal = Journal(ctx.workdir / "scores.jsonl")
        cuts: list[Cut[C]] = []
        while not self.enough() and (now := self.candidates()):
            prefix = f"{len(cuts)}:"
            scores = [
                journal.remember(prefix + self.label(c), lambda c=c: self._score(c))
                for c in ctx.each(now, f"cut {len(cuts) + 1}")
            ]
            chosen = self._decide(now, scores)
            self.cut(chosen.candidate)
            cuts.append(chosen)
            ctx.record(f"cut {len(cuts)}: {chosen.label}", chosen.score)
        return cuts

    def _score(self, candidate: C) -> float:
        """A candidate without which the model gives no finite score is no candidate."""
        try:
            return self.score(candidate)
        except Reject as refused:
            if any(d.fault is not not_a_number for d in refused.diagnostics):
                raise
            return math.nan

    def _decide(self, now: Sequence[C], scores: Sequence[float]) -> Cut[C]:
        """The best finite score; the first of equals."""
        sign = 1.0 if self.metric.better == "lower" else -1.0
        ranked = sorted((sign * s, i) for i, s in enumerate(scores) if math.isfinite(s))
        if not ranked:
            raise Reject(no_finite_score(
                f"all {len(now)} candidates score NaN or infinity",
                help="score on other data, or check the model's weights with `effc test`"))
        best = ranked[0][1]
        second = sign * ranked[1][0] if len(ranked) > 1 else None
        return Cut(now[best], self.label(now[best]), scores[best], second)

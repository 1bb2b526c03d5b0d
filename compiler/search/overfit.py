"""A metric that no decision reads, on rows of its own, beside a search."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...dsl.show import show
from ...dsl.values import MetricRef
from ..report.progress import Warned
from ..report.quantity import counted

if TYPE_CHECKING:
    from .loop import Search

FITTED = 1.25  # how many times faster than the score it may grow before that is said


@dataclass(frozen=True)
class Look:
    """How far the search was (of its whole budget), what it scored by and that score, and the metric beside it."""

    share: float
    by: MetricRef
    score: float
    second: float


@dataclass
class Overfit:
    """Where it suffers more than the score, the search has fitted the score's rows.

    goal    the whole search's
    every   share of it after which the metric is measured again
    """

    metric: MetricRef
    goal: float
    every: float = 0.25
    looks: list[Look] = field(default_factory=list)

    def look(self, search: "Search", saved: float, by: MetricRef, last: bool = False) -> None:
        """Measure if it is time to; `by` is what the search scores by now."""
        share = round(saved / self.goal, 6)
        if self.looks and not last and share < self.looks[-1].share + self.every and by == self.looks[-1].by:
            return
        value = search.measured(f"{len(search.cuts)}:beside", self.metric)
        self.looks.append(Look(share, by, search.base(by), value))
        search.ctx.record(f"{show(self.metric)} after {counted(len(search.cuts), 'cut')}", value)

    def say(self, search: "Search") -> None:
        """Note what was seen, and warn where the metric grew much faster than the score since that was in use."""
        search.program.note(beside=show(self.metric), seen=[self._row(s) for s in self.looks])
        last = self.looks[-1]
        first = next(s for s in self.looks if s.by == last.by)
        if min(first.score, first.second, last.score) > 0:
            grown, fitted = last.second / first.second, last.score / first.score
            if grown > FITTED * fitted:
                search.ctx.tell(
                    Warned(
                        f"warning: {show(self.metric)} grew {grown:.2f}-fold and {show(last.by)}, the score, "
                        f"{fitted:.2f}-fold: the search fitted the score's rows; give it more of them"
                    )
                )

    def _row(self, look: Look) -> list[Any]:
        return [look.share, show(look.by), look.score, look.second]

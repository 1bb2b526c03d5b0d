"""Parameters of passes that make one kind of modules narrower."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from ....dsl.checker.values import DataRef, MetricRef, Ratio
from ...analysis.planning.amount import Amount
from ...plugin.interfaces import Lossy, Pass, param
from .compensation import FitSettings
from .greedy import GreedyPruner, GreedySearch
from .parts import WidthParts


class WidthPruner(GreedyPruner, Pass):
    """Makes modules narrower: all alike, or with a score one where the loss suffers least.

    uneven   effect of a score
    """

    keeps = Lossy()
    changes = ("weights",)
    determinism = "deterministic"
    uneven: ClassVar[str] = "uneven widths"

    score: MetricRef | None = param("What decides which modules lose more; without it all lose alike.", default=None)
    search: Literal["racing", "exact"] = param("With a score: try what may be best, or everything.", default="racing")

    def effects(self) -> Iterator[str]:
        if self.score is not None:
            yield self.uneven

    def narrowing_search(self, keep: Ratio, parts: WidthParts, fit: FitSettings, align: int) -> GreedySearch:
        """The search for how narrow the groups of some parts become, `align` items at a time."""
        total, exact = sum(group.count for group in parts.groups), self.search == "exact"
        return GreedySearch(Amount(keep), parts.kind, total, (parts,), self.score, exact, align=align, fit=fit)


class RefittingPruner(WidthPruner):
    """Refits what reads the items that go, and is told which of them go first."""

    reorder: Literal["l1", "wanda", "obs"] | None = param(
        "Which items of a module go first: by weights, by weights and inputs, or by the error left after repair; "
        "obs with a score, else l1.",
        default=None,
    )
    repair: bool = param("With a score, refit what reads the items that go.", default=True)
    data: DataRef | None = param(
        "Rows that items are ranked and readers refitted on, several thousand tokens, not the score's; unless given, "
        "32 that the model itself writes.",
        default=None,
    )

    @property
    def fit_settings(self) -> FitSettings:
        return FitSettings(self.reorder or "obs", self.repair, self.data)

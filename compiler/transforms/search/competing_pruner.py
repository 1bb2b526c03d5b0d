"""Parameters of passes in which cuts of several kinds compete."""

from collections.abc import Iterator
from typing import Literal

from ....dsl.checker.rules import Problem, Unread
from ....dsl.checker.values import DataRef, MetricRef
from ...plugin.interfaces import Lossy, Pass, param
from .compensation import FitSettings
from .greedy import GreedyPruner


class CompetingPruner(GreedyPruner, Pass):
    """Cuts of several kinds compete; what is missed least for what it saves goes, again and again."""

    keeps = Lossy()
    changes = ("weights", "branches")
    determinism = "deterministic"

    score: MetricRef = param("What the model is scored by without each candidate.")
    search: Literal["racing", "exact"] = param("Score what may win, or everything.", default="racing")
    rank: Literal["ratio", "loss"] | None = param(
        "By loss per unit saved, or by plain loss, which an exact search takes unless told.", default=None
    )
    estimate: Literal["none", "taylor"] = param(
        "What a racing search knows of candidates before it scores them: `taylor` leaves out those that gradients show "
        "to lose.",
        default="none",
    )
    together: int = param("Cuts of different layers that a racing search makes at once.", default=1, ge=1, unit="cuts")
    repair: bool | None = param("Refit what reads the items that go; no in an exact search, else yes.", default=None)
    data: DataRef | None = param(
        "Rows that items are ranked and readers refitted on, several thousand tokens, not the score's; unless given, "
        "32 that the model itself writes.",
        default=None,
    )
    overshoot: bool = param(
        "Whether more than half of the goal may go beyond it, where no part that is left is smaller; an exact search "
        "does that as published.",
        default=False,
    )
    clock: MetricRef = param("Which latency, measured on the machine that compiles.", default=MetricRef("decode.p50"))

    def problems(self) -> Iterator[Problem]:
        if self.search != "racing":
            yield Unread(("estimate", "together"), "`search: racing`", ("search",))

    @property
    def exact(self) -> bool:
        return self.search == "exact"

    def fit_settings(self, reorder: Literal["l1", "wanda", "obs"] | None = None) -> FitSettings:
        """Items ordered by `reorder`, or by what the repair leaves where there is one, else by weights."""
        repair = not self.exact if self.repair is None else self.repair
        return FitSettings(reorder or ("obs" if repair else "l1"), repair, self.data)

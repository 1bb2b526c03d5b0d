"""Parameters of passes that remove whole parts of one kind."""

from typing import ClassVar, Literal

from ....dsl.checker.values import MetricRef, Ratio
from ...analysis.planning.amount import Amount
from ...plugin.interfaces import Lossy, Pass, param
from .greedy import GreedyPruner, GreedySearch
from .parts import RemovableParts


class BlockPruner(GreedyPruner, Pass):
    """Removes parts as a whole, again and again the one that is missed least."""

    keeps = Lossy()
    changes: ClassVar[tuple[str, ...]] = ("branches",)
    determinism = "deterministic"

    score: MetricRef = param("What the model is scored by without each candidate.")
    search: Literal["racing", "exact"] = param("Score what may be missed least, or everything.", default="racing")

    def removal_search(self, remove: int | Ratio, budget_kind: str, parts: RemovableParts) -> GreedySearch:
        """The search for as many of some parts as are to go."""
        amount = Amount(remove, removes=True)
        return GreedySearch(amount, budget_kind, parts.all, (parts,), self.score, exact=self.search == "exact")

"""Budget of a search, and the tolerance of a cut."""

from dataclasses import dataclass

from ...analysis.planning.amount import SPARE
from .candidate import Candidate

CUTS = "cuts"  # a budget of them is met by their number, whatever they save
AMISS = 0.1  # of the goal that may be saved beyond it without a word


@dataclass(frozen=True)
class Budget:
    """Amount to save, and of what: "params", "flops", "blocks", "channels", "heads", "kv_heads", "cuts"."""

    of: str
    goal: float
    total: float

    def is_met(self, saved_amount: float) -> bool:
        return saved_amount >= self.goal * (1 - 1e-9)  # 1e-9: sums of differences of large numbers

    def is_within_with_cut(self, saved_amount: float, candidate: Candidate) -> bool:
        """Whether a cut saves at most half of the goal more than is asked for: a branch of a small model may be
        all of it, and more, where some channels would do."""
        return self.of == CUTS or self.is_within(saved_amount + candidate.saves(self.of))

    def is_within(self, saved_amount: float) -> bool:
        return saved_amount <= (1 + SPARE) * self.goal

    def is_beyond(self, saved_amount: float) -> bool:
        """Whether far more went than was asked for."""
        return self.of != CUTS and saved_amount > (1 + AMISS) * self.goal

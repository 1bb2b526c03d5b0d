"""How the next cut is chosen among the candidates."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .candidate import Candidate


@dataclass
class Round:
    """One decision to make.

    base()     the model's score as it is
    score(c)   its score without a candidate; NaN where there is none
    sign       1 where a low score is good, -1 where a high one is
    left       how much of the budget is still to be saved: what a cut saves beyond it is worth nothing
    ahead(c)   hears which candidates will be asked for next, if nothing unforeseen comes: workers score them meanwhile
    """

    candidates: Sequence[Candidate]
    base: Callable[[], float]
    score: Callable[[Candidate], float]
    sign: float
    left: float = math.inf
    ahead: Callable[[Sequence[Candidate]], None] = lambda candidates: None
    scores: dict[str, float] = field(default_factory=dict)

    def loss(self, candidate: Candidate) -> float:
        """The score of a candidate, turned so that less is better; infinite where there is none."""
        value = self.scores[candidate.name] = self.score(candidate)
        return self.sign * value if math.isfinite(value) else math.inf

    def runner_up(self, winner: str) -> float | None:
        """The best score that lost; None where nothing else had one."""
        rest = [s for name, s in self.scores.items() if name != winner and math.isfinite(s)]
        return min(rest, key=lambda s: self.sign * s, default=None)

    def growth(self, candidate: Candidate) -> float:
        """How much worse the score is without a candidate; infinite where there is none."""
        return self.loss(candidate) - self.sign * self.base()

    def cost(self, candidate: Candidate, growth: float, per: str) -> float:
        """Growth per unit saved; a gain counts more where more is saved."""
        saved = min(candidate.saves(per), self.left) if per else 1.0
        if not math.isfinite(growth) or saved <= 0:
            return math.inf
        return growth / saved if growth > 0 else growth * saved


class Choice(ABC):
    @abstractmethod
    def choose(self, now: Round) -> Candidate | None:
        """The candidate to cut; None where none has a finite score."""


class Exact(Choice):
    """Scores every candidate in every round and takes the best; the first of equals.

    per   what a cut's loss is divided by: "params", "flops", ...; "" compares plain losses

    Source: BlockPruner and MultiPruner (arXiv 2501.09949), whose comparison is a strict `<` in candidate order.
    """

    def __init__(self, per: str = ""):
        self.per = per

    def choose(self, now: Round) -> Candidate | None:
        best, least = None, math.inf
        now.ahead(now.candidates)
        for candidate in now.candidates:
            cost = now.cost(candidate, now.growth(candidate), self.per) if self.per else now.loss(candidate)
            if cost < least:
                best, least = candidate, cost
        return best


class Racing(Choice):
    """Scores the candidates that may win, most hopeful first, and stops once no other can.

    What a place's last cut cost, per unit of what is saved, is taken as the least that its next one will cost:
    damage rarely shrinks as more is cut. So the candidates are asked in the order of that cost, and the round ends
    when the best one asked is below everybody else's remembered cost, or after `patience` fruitless scores.

    per        what a cut's loss is divided by: "params", "flops", ...; "" compares plain losses
    patience   how many candidates in a row may fail to be better

    Source: lazy greedy (Minoux 1978, "Accelerated greedy algorithms"); the division: own.
    """

    def __init__(self, per: str, patience: int = 3):
        self.per, self.patience = per, patience
        self.known: dict[str, float] = {}  # place -> growth at its last score

    def choose(self, now: Round) -> Candidate | None:
        best, least, fruitless = None, (math.inf, math.inf), 0
        hopes = {place: (self._hope(c, now), place) for place, c in enumerate(now.candidates)}
        order = sorted(hopes.items(), key=lambda item: item[1])
        for turn, (place, hope) in enumerate(order):
            if best is not None and hope[0] > -math.inf and (hope > least or fruitless >= self.patience):
                break
            now.ahead([now.candidates[other] for other, hope in order[turn:] if hope < least])
            candidate = now.candidates[place]
            growth = self.known[candidate.place] = now.growth(candidate)
            cost = (now.cost(candidate, growth, self.per), place)  # of equals the first, as in Exact
            if math.isfinite(cost[0]) and cost < least:
                best, least, fruitless = candidate, cost, 0
            else:
                fruitless += 1
        return best

    def _hope(self, candidate: Candidate, now: Round) -> float:
        """The least that it may cost; minus infinity where it was never scored."""
        growth = self.known.get(candidate.place)
        return -math.inf if growth is None else now.cost(candidate, growth, self.per)

"""How the next cut is chosen among the candidates."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .candidate import Candidate
from .score_estimates import Forecast, Foresight

FOLD = 1.5  # times the best's cost that what goes together with it may have cost


@dataclass
class Round:
    """One decision to make.

    base()     the model's score as it is
    ask(cs)    its scores without each of some candidates; NaN where there is none
    sign       1 where a low score is good, -1 where a high one is
    left       how much of the budget is still to be saved: what a cut saves beyond it is worth nothing
    ahead(c)   hears which candidates will be asked for next, if nothing unforeseen comes: workers score them meanwhile
    """

    candidates: Sequence[Candidate]
    base: Callable[[], float]
    ask: Callable[[Sequence[Candidate]], Sequence[float]]
    sign: float
    left: float = math.inf
    ahead: Callable[[Sequence[Candidate]], None] = lambda candidates: None
    scores: dict[str, float] = field(default_factory=dict)

    def losses(self, candidates: Sequence[Candidate]) -> list[float]:
        """Scores of candidates, turned so that less is better; infinite where there is none."""
        for candidate, value in zip(candidates, self.ask(candidates), strict=True):
            self.scores[candidate.name] = value
        found = (self.scores[c.name] for c in candidates)
        return [self.sign * value if math.isfinite(value) else math.inf for value in found]

    def runner_up(self, winner: str) -> float | None:
        """The best score that lost; None where nothing else had one."""
        rest = [s for name, s in self.scores.items() if name != winner and math.isfinite(s)]
        return min(rest, key=lambda s: self.sign * s, default=None)

    def growths(self, candidates: Sequence[Candidate]) -> list[float]:
        """How much worse the score is without each of them; infinite where there is none."""
        losses = self.losses(candidates)
        return [loss - self.sign * self.base() for loss in losses]

    def cost(self, candidate: Candidate, growth: float, per: str) -> float:
        """Growth per unit saved; a gain counts more where more is saved."""
        saved = min(candidate.saves(per), self.left) if per else 1.0
        if not math.isfinite(growth) or saved <= 0:
            return math.inf
        return growth / saved if growth > 0 else growth * saved


class Choice(ABC):
    """
    scores_all   cuts that save far more than is asked for are candidates, too
    """

    scores_all: ClassVar[bool] = False

    @abstractmethod
    def choose(self, now: Round) -> Candidate | None:
        """The candidate to cut; None where none has a finite score."""

    def companions(self, now: Round, best: Candidate) -> list[tuple[Candidate, float]]:
        """What may go together with the best, each with the growth that is allowed for it."""
        return []

    def judged(self, together: bool) -> None:  # noqa: B027 (who has no companions hears of none)
        """Hear whether companions went together with the best, or were worse than expected."""

    def foresee(self, estimates: Callable[[], Forecast | None]) -> None:  # noqa: B027 (who scores all needs none)
        """Take estimates of the candidates, where they are of use."""

    def notes(self, now: Round) -> dict[str, Any]:
        """What is to be known of a decision besides its scores."""
        return {}


class Exact(Choice):
    """Scores every candidate in every round and takes the best; the first of equals.

    per   what a cut's loss is divided by: "params", "flops", ...; "" compares plain losses

    Source: BlockPruner and MultiPruner (arXiv 2501.09949), whose comparison is a strict `<` in candidate order.
    """

    scores_all = True

    def __init__(self, per: str = ""):
        self.per = per

    def choose(self, now: Round) -> Candidate | None:
        best, least = None, math.inf
        losses = now.losses(now.candidates)
        for candidate, loss in zip(now.candidates, losses, strict=True):
            cost = now.cost(candidate, loss - now.sign * now.base(), self.per) if self.per else loss
            if cost < least:
                best, least = candidate, cost
        return best


class Racing(Choice):
    """Scores the candidates that may win, most hopeful first, and stops once no other can.

    What a place's last cut cost, per unit of what is saved, is taken as the least that its next one will cost:
    damage rarely shrinks as more is cut. So the candidates are asked in the order of that cost, and the round ends
    when the best one asked is below everybody else's remembered cost, or after `patience` fruitless scores. A place
    that was never asked is asked at once, or, where an estimate says what it costs, when it is that one's turn; it
    is left out where even the least that the estimate allows is above the best.

    per        what a cut's loss is divided by: "params", "flops", ...; "" compares plain losses
    foresight  estimates of places that were not asked yet
    together   how many cuts of different layers may be made after one round
    patience   how many candidates in a row may fail to be better

    Source: lazy greedy (Minoux 1978, "Accelerated greedy algorithms"); the division and estimates: own.
    """

    def __init__(self, per: str, foresight: Foresight | None = None, together: int = 1, patience: int = 3):
        self.per, self.patience = per, patience
        self.foresight, self.together, self.most = foresight, together, together
        self.known: dict[str, float] = {}  # place -> growth at its last score

    def choose(self, now: Round) -> Candidate | None:
        race = _Race(self, now)
        race.ask([place for place, c in enumerate(now.candidates) if self._is_unknown(c)])
        while hopeful := race.hopeful():
            now.ahead([now.candidates[place] for place in hopeful])
            race.ask(hopeful[:1])
        return race.best

    def _is_unknown(self, candidate: Candidate) -> bool:
        return candidate.place not in self.known and not self.foresees(candidate)

    def foresees(self, candidate: Candidate) -> bool:
        return self.foresight is not None and candidate.place in self.foresight

    def companions(self, now: Round, best: Candidate) -> list[tuple[Candidate, float]]:
        """Narrowings in other layers that should cost about what the best costs, as far as the budget takes them, or no
        more than what half of the budget that is left will cost anyway."""
        able = [(c, self._expected(c, now)) for c in now.candidates if best.joins and c.joins and c is not best]
        asked = [
            (cost, n, c, growth)
            for n, (c, growth) in enumerate(able)
            if growth is not None and math.isfinite(cost := now.cost(c, growth, self.per))
        ]
        asked.sort(key=lambda one: one[:2])
        most = FOLD * max(now.cost(best, self.known[best.place], self.per), 0.0)
        level = self._level([(cost, candidate) for cost, _, candidate, _ in asked], now.left / 2)
        found: list[tuple[Candidate, float]] = []
        units, left = {best.unit}, now.left - _saved(best, self.per)
        for cost, _, candidate, growth in asked:
            if len(found) + 1 >= self.together or cost > max(most, level):
                break
            saved = _saved(candidate, self.per)
            if candidate.unit not in units and saved <= left:
                found.append((candidate, max(growth, level * saved)))
                units.add(candidate.unit)
                left -= saved
        return found

    def _level(self, costs: Sequence[tuple[float, Candidate]], wanted: float) -> float:
        """The cost of the last candidate, from the cheapest on, that it takes to save so much."""
        for cost, candidate in costs:
            wanted -= _saved(candidate, self.per)
            if wanted <= 0:
                return cost
        return -math.inf

    def _expected(self, candidate: Candidate, now: Round) -> float | None:
        """The growth of its last score, or else of its estimate."""
        if candidate.place in self.known:
            return self.known[candidate.place]
        return self.foresight.growths(candidate, now)[0] if self.foresees(candidate) else None

    def foresee(self, estimates: Callable[[], Forecast | None]) -> None:
        if self.foresight is not None and (found := estimates()) is not None:
            self.foresight.take(*found)

    def notes(self, now: Round) -> dict[str, Any]:
        if self.foresight is None or not self.foresight.estimates:
            return {}
        left = sum(c.place not in self.known for c in now.candidates)
        missed, self.foresight.missed = self.foresight.missed, []
        return {"left_out": left, "slack": round(self.foresight.slack, 4), **({"below": missed} if missed else {})}

    def judged(self, together: bool) -> None:
        self.together = min(self.most, self.together + 1) if together else max(min(2, self.most), self.together // 2)


def _saved(candidate: Candidate, per: str) -> float:
    return candidate.saves(per) if per else 1.0


class _Race:
    """One round of a racing search."""

    def __init__(self, racing: Racing, now: Round):
        self.racing, self.now = racing, now
        self.best: Candidate | None = None
        self.least, self.fruitless = (math.inf, math.inf), 0
        self.waiting = set(range(len(now.candidates)))

    def ask(self, places: Sequence[int]) -> None:
        """Score candidates, by their places in the round; of equals the first is best, as in Exact."""
        asked = [self.now.candidates[place] for place in places]
        self.waiting -= set(places)
        growths = self.now.growths(asked) if asked else []
        for place, candidate, growth in zip(places, asked, growths, strict=True):
            if candidate.place not in self.racing.known and self.racing.foresees(candidate):
                self.racing.foresight.learn(candidate, growth, self.now)
            self.racing.known[candidate.place] = growth
            cost = (self.now.cost(candidate, growth, self.racing.per), place)
            if math.isfinite(cost[0]) and cost < self.least:
                self.best, self.least, self.fruitless = candidate, cost, 0
            else:
                self.fruitless += 1

    def hopeful(self) -> list[int]:
        """Those that may still win, the most hopeful first."""
        able = [(hope, place) for place in self.waiting if (hope := self._hope(place)) is not None]
        return [place for _, place in sorted(able)]

    def _hope(self, place: int) -> float | None:
        """What a candidate is expected to cost; None where it can't be the best."""
        candidate, racing = self.now.candidates[place], self.racing
        if candidate.place in racing.known:
            expected = least = racing.known[candidate.place]
        else:
            expected, least = racing.foresight.growths(candidate, self.now)
        if self.best is not None:
            beaten = (self.now.cost(candidate, least, racing.per), place) > self.least
            if beaten or self.fruitless >= racing.patience:
                return None
        return self.now.cost(candidate, expected, racing.per)

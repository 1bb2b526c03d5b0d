"""Choice of the next cut among the candidates."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .candidate import Candidate
from .score_estimates import Forecast, ScoreEstimates

FOLD = 1.5  # times the best's cost that what goes together with it may have cost


@dataclass
class Round:
    """One decision to make.

    current_score()    the model's score as it is
    score(cs)          its scores without each of some candidates; NaN where there is none
    sign               1 where a low score is good, -1 where a high one is
    remaining_savings  how much of the budget is still to be saved: what a cut saves beyond it is worth nothing
    prefetch(cs)       hears which candidates will be asked for next, if nothing unforeseen comes: workers score them
    scores             by candidate's name, so far
    """

    candidates: Sequence[Candidate]
    current_score: Callable[[], float]
    score: Callable[[Sequence[Candidate]], Sequence[float]]
    sign: float
    remaining_savings: float = math.inf
    prefetch: Callable[[Sequence[Candidate]], None] = lambda candidates: None
    scores: dict[str, float] = field(default_factory=dict)

    def score_losses(self, candidates: Sequence[Candidate]) -> list[float]:
        """Scores of candidates, turned so that less is better; infinite where there is none."""
        for candidate, value in zip(candidates, self.score(candidates), strict=True):
            self.scores[candidate.name] = value
        scores = (self.scores[c.name] for c in candidates)
        return [self.sign * value if math.isfinite(value) else math.inf for value in scores]

    def runner_up(self, winner: str) -> float | None:
        """The best score that lost; None where nothing else had one."""
        losers = [s for name, s in self.scores.items() if name != winner and math.isfinite(s)]
        return min(losers, key=lambda s: self.sign * s, default=None)

    def score_growths(self, candidates: Sequence[Candidate]) -> list[float]:
        """Increase of the score without each of them; infinite where there is none."""
        losses = self.score_losses(candidates)
        return [loss - self.sign * self.current_score() for loss in losses]

    def cost(self, candidate: Candidate, growth: float, quantity: str) -> float:
        """Growth per unit saved; a gain counts more where more is saved."""
        saved = min(candidate.saves(quantity), self.remaining_savings) if quantity else 1.0
        if not math.isfinite(growth) or saved <= 0:
            return math.inf
        return growth / saved if growth > 0 else growth * saved


class CutStrategy(ABC):
    """
    scores_all   cuts that save far more than is asked for are candidates, too
    """

    scores_all: ClassVar[bool] = False

    @abstractmethod
    def score_and_choose(self, round_: Round) -> Candidate | None:
        """The candidate to cut; None where none has a finite score."""

    def joint_companions_and_growths(self, round_: Round, best: Candidate) -> list[tuple[Candidate, float]]:
        """Candidates that may be removed with the best, each with its allowed growth."""
        return []

    def adapt_joint_count(self, was_accepted: bool) -> None:  # noqa: B027 (only strategies with companions adapt)
        """Let more companions come with the next best where these were accepted, fewer where they cost too much."""

    def take_forecast(self, make_forecast: Callable[[], Forecast | None]) -> None:  # noqa: B027 (only strategies that skip candidates use it)
        """Take estimates of the candidates, where they are of use."""

    def pop_facts(self, round_: Round) -> dict[str, Any]:
        """Facts of a decision besides its scores; what gathered for them since the last call is forgotten."""
        return {}


class Exact(CutStrategy):
    """Scores every candidate in every round and takes the best; the first of equals.

    quantity   what a cut's loss is divided by: "params", "flops", ...; "" compares plain losses

    Source: BlockPruner and MultiPruner (arXiv 2501.09949), whose comparison is a strict `<` in candidate order.
    """

    scores_all = True

    def __init__(self, quantity: str = ""):
        self.per = quantity

    def score_and_choose(self, round_: Round) -> Candidate | None:
        best, least = None, math.inf
        losses = round_.score_losses(round_.candidates)
        for candidate, loss in zip(round_.candidates, losses, strict=True):
            cost = round_.cost(candidate, loss - round_.sign * round_.current_score(), self.per) if self.per else loss
            if cost < least:
                best, least = candidate, cost
        return best


class Racing(CutStrategy):
    """Scores the candidates that may win, most hopeful first, and stops once no other can.

    What a place's last cut cost, per unit of what is saved, is taken as the least that its next one will cost:
    damage rarely shrinks as more is cut. So the candidates are asked in the order of that cost, and the round ends
    when the best one asked is below everybody else's remembered cost, or after `patience` fruitless scores. A place
    that was never asked is asked at once, or, where an estimate says what it costs, when it is that one's turn; it
    is left out where even the least that the estimate allows is above the best.

    quantity         what a cut's loss is divided by: "params", "flops", ...; "" compares plain losses
    score_estimates  estimates of places that were not asked yet
    max_joint        how many cuts of different layers may be made after one round, at most
    patience         how many candidates in a row may fail to be better

    Source: lazy greedy (Minoux 1978, "Accelerated greedy algorithms"); the division and estimates: own.
    """

    def __init__(
        self, quantity: str, score_estimates: ScoreEstimates | None = None, max_joint: int = 1, patience: int = 3
    ):
        self.per, self.patience = quantity, patience
        self.score_estimates, self.n_joint, self.max_joint = score_estimates, max_joint, max_joint
        self.known: dict[str, float] = {}  # place -> growth at its last score

    def score_and_choose(self, round_: Round) -> Candidate | None:
        race = _Race(self, round_)
        race.score_and_update_best([index for index, c in enumerate(round_.candidates) if self._needs_first_score(c)])
        while hopeful := race.indices_that_may_win():
            round_.prefetch([round_.candidates[index] for index in hopeful])
            race.score_and_update_best(hopeful[:1])
        return race.best

    def _needs_first_score(self, candidate: Candidate) -> bool:
        return candidate.location not in self.known and not self.has_estimate(candidate)

    def has_estimate(self, candidate: Candidate) -> bool:
        return self.score_estimates is not None and candidate.location in self.score_estimates

    def joint_companions_and_growths(self, round_: Round, best: Candidate) -> list[tuple[Candidate, float]]:
        """Narrowings in other layers that should cost about what the best costs, as far as the budget takes them, or no
        more than what half of the budget that is left will cost anyway."""
        able = [
            (c, self._expected_growth_or_none(c, round_))
            for c in round_.candidates
            if best.joins and c.joins and c is not best
        ]
        affordable = [
            (cost, n, c, growth)
            for n, (c, growth) in enumerate(able)
            if growth is not None and math.isfinite(cost := round_.cost(c, growth, self.per))
        ]
        affordable.sort(key=lambda one: one[:2])
        ceiling = FOLD * max(round_.cost(best, self.known[best.location], self.per), 0.0)
        level = self._cost_of_last_needed_candidate(
            [(cost, candidate) for cost, _, candidate, _ in affordable], round_.remaining_savings / 2
        )
        companions: list[tuple[Candidate, float]] = []
        units, left = {best.unit}, round_.remaining_savings - _saved(best, self.per)
        for cost, _, candidate, growth in affordable:
            if len(companions) + 1 >= self.n_joint or cost > max(ceiling, level):
                break
            saved = _saved(candidate, self.per)
            if candidate.unit not in units and saved <= left:
                companions.append((candidate, max(growth, level * saved)))
                units.add(candidate.unit)
                left -= saved
        return companions

    def _cost_of_last_needed_candidate(
        self, ascending_costs: Sequence[tuple[float, Candidate]], required_savings: float
    ) -> float:
        """The cost of the last candidate, from the cheapest on, that it takes to save so much."""
        for cost, candidate in ascending_costs:
            required_savings -= _saved(candidate, self.per)
            if required_savings <= 0:
                return cost
        return -math.inf

    def _expected_growth_or_none(self, candidate: Candidate, round_: Round) -> float | None:
        """The growth of its last score, or else of its estimate."""
        if candidate.location in self.known:
            return self.known[candidate.location]
        return (
            self.score_estimates.expected_growth_and_bound(candidate, round_)[0]
            if self.has_estimate(candidate)
            else None
        )

    def take_forecast(self, make_forecast: Callable[[], Forecast | None]) -> None:
        if self.score_estimates is not None and (forecast := make_forecast()) is not None:
            self.score_estimates.set_estimates(*forecast)

    def pop_facts(self, round_: Round) -> dict[str, Any]:
        if self.score_estimates is None or not self.score_estimates.estimates:
            return {}
        left = sum(c.location not in self.known for c in round_.candidates)
        missed, self.score_estimates.missed = self.score_estimates.missed, []
        return {
            "left_out": left,
            "slack": round(self.score_estimates.slack, 4),
            **({"below": missed} if missed else {}),
        }

    def adapt_joint_count(self, was_accepted: bool) -> None:
        self.n_joint = (
            min(self.max_joint, self.n_joint + 1) if was_accepted else max(min(2, self.max_joint), self.n_joint // 2)
        )


def _saved(candidate: Candidate, quantity: str) -> float:
    return candidate.saves(quantity) if quantity else 1.0


class _Race:
    """One round of a racing search."""

    def __init__(self, racing: Racing, round_: Round):
        self.racing, self.current = racing, round_
        self.best: Candidate | None = None
        self.least, self.fruitless = (math.inf, math.inf), 0
        self.waiting = set(range(len(round_.candidates)))

    def score_and_update_best(self, candidate_indices: Sequence[int]) -> None:
        """Score candidates, by their places in the round; of equals the first is best, as in Exact."""
        candidates = [self.current.candidates[index] for index in candidate_indices]
        self.waiting -= set(candidate_indices)
        growths = self.current.score_growths(candidates) if candidates else []
        for index, candidate, growth in zip(candidate_indices, candidates, growths, strict=True):
            if candidate.location not in self.racing.known and self.racing.has_estimate(candidate):
                self.racing.score_estimates.update_slack_by_score(candidate, growth, self.current)
            self.racing.known[candidate.location] = growth
            cost = (self.current.cost(candidate, growth, self.racing.per), index)
            if math.isfinite(cost[0]) and cost < self.least:
                self.best, self.least, self.fruitless = candidate, cost, 0
            else:
                self.fruitless += 1

    def indices_that_may_win(self) -> list[int]:
        """Candidates that may still win, the most hopeful first."""
        able = [(hope, index) for index in self.waiting if (hope := self._expected_cost_if_can_win(index)) is not None]
        return [index for _, index in sorted(able)]

    def _expected_cost_if_can_win(self, candidate_index: int) -> float | None:
        """Expected cost of a candidate; None where it can't be the best."""
        candidate, racing = self.current.candidates[candidate_index], self.racing
        if candidate.location in racing.known:
            expected = least = racing.known[candidate.location]
        else:
            expected, least = racing.score_estimates.expected_growth_and_bound(candidate, self.current)
        if self.best is not None:
            beaten = (self.current.cost(candidate, least, racing.per), candidate_index) > self.least
            if beaten or self.fruitless >= racing.patience:
                return None
        return self.current.cost(candidate, expected, racing.per)

"""Estimates of candidates before they are scored, and their reliability."""

import math
from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ....dsl.checker.values import MetricRef
from .candidate import Candidate
from .gradients import Estimate, GradientSweep

if TYPE_CHECKING:
    from .choice import Round
    from .loop import Search

Forecast = tuple[Mapping[str, tuple[Estimate, float]], Callable[[float, float], float | None]]
SLACK = 0.5  # how far below an estimate the truth is taken to lie at most, of its terms' sizes, until FEW were scored
MIN_SAMPLES = 8
TRUST = 0.9  # of the candidates that were scored, how many keep to the bound
MARGIN = 0.1  # what is put on top, of the terms' sizes


class ExpectedGrowth(NamedTuple):
    growth: float
    lower_bound: float


class ScoreEstimates:
    """Estimates by place, and the least that the truth may be.

    The truth is held to be at least estimate - slack * (|first| + second), its two terms. Whatever is scored tells how
    far below its estimate it lies: nine of ten of them lie above the bound, of the first few all do.

    estimates   place -> (estimate, what the candidate saved then)
    dearer      (score, nats) -> the score when every token costs so many nats more
    slack       so far; `missed` names what was found below its least
    """

    def __init__(self) -> None:
        self.estimates: dict[str, tuple[Estimate, float]] = {}
        self.dearer: Callable[[float, float], float | None] = lambda score, nats: None
        self.missed: list[str] = []
        self.slack = SLACK
        self._short: list[float] = []  # how far below, of the terms' sizes, in ascending order

    def set_estimates(
        self, estimates: Mapping[str, tuple[Estimate, float]], dearer: Callable[[float, float], float | None]
    ) -> None:
        self.estimates, self.dearer = dict(estimates), dearer

    def __contains__(self, path: str) -> bool:
        return path in self.estimates

    def expected_growth_and_bound(self, candidate: Candidate, round_: "Round") -> ExpectedGrowth:
        """Expected growth of the score without it, and a lower bound."""
        growth, terms = self._expected_growth_and_term_size(candidate, round_)
        return ExpectedGrowth(growth, growth - self.slack * terms)

    def update_slack_by_score(self, candidate: Candidate, measured_growth: float, round_: "Round") -> None:
        """Compare an estimate with what was scored."""
        expected, terms = self._expected_growth_and_term_size(candidate, round_)
        if not (terms > 0 and math.isfinite(measured_growth)):
            return
        if measured_growth < expected - self.slack * terms:
            self.missed.append(candidate.name)
        insort(self._short, (expected - measured_growth) / terms)
        is_early = len(self._short) < MIN_SAMPLES
        worst = self._short[-1 if is_early else int(TRUST * len(self._short))]
        self.slack = max(SLACK if is_early else 0.0, worst + MARGIN)

    def _expected_growth_and_term_size(self, candidate: Candidate, round_: "Round") -> tuple[float, float]:
        """The growth that its estimate tells, and the size of its terms.

        A candidate that has become smaller since, a branch that was narrowed, is taken to cost less as well.
        """
        estimate, saved = self.estimates[candidate.location]
        share = min(1.0, candidate.saves("params") / saved) if saved > 0 else 1.0
        return share * self._growth(estimate.growth, round_), share * self._growth(estimate.terms, round_)

    def _growth(self, log_increase: float, round_: "Round") -> float:
        score = self.dearer(round_.current_score(), log_increase)
        assert score is not None, "a score that follows from nats was estimated"
        return round_.sign * (score - round_.current_score())


def estimate_scores_by_gradients(
    search: "Search", cut_index: int, candidates: Sequence[Candidate], metric: MetricRef
) -> Forecast | None:
    """Estimates by place, and how the score follows from them; None where it doesn't. Journalled under the number of
    the cut."""
    dearer, base = search.ctx.metric(metric).dearer, search.current_score(metric)
    if dearer(base, 0.0) is None:
        return None
    prefix = search.prefix_of(metric)

    def sweep() -> list[list[Any]]:
        if prefix.chain is None:  # the base came from the journal
            prefix.measure_from(lambda: search.ctx.metric(metric).measure(search.program.model, search.ctx))
        gradients = GradientSweep(prefix, search.ctx.seed)
        with search.ctx.run.interruptible_search():
            tracked = search.ctx.each(
                gradients.estimate_if_supported(candidates), "estimating candidates", len(candidates)
            )
            return [[c.location, e.first, e.second] for c, e in tracked]

    estimates = {
        site: Estimate(*terms) for site, *terms in search.journal.get_or_compute(f"{cut_index}:estimates", sweep)
    }
    return {
        c.location: (estimates[c.location], c.saves("params")) for c in candidates if c.location in estimates
    }, dearer

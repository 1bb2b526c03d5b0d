"""What is thought of candidates before they are scored, and how far it can be trusted."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...dsl.values import MetricRef
from .candidate import Candidate
from .gradients import Estimate, Gradients

if TYPE_CHECKING:
    from .choice import Round
    from .loop import Search

Forecast = tuple[Mapping[str, tuple[Estimate, float]], Callable[[float, float], float | None]]
SLACK = 0.5  # how far below an estimate the truth is taken to lie at most, before any was scored, of its terms' sizes
MARGIN = 1.25  # how much more than the worst that was seen


class Foresight:
    """Estimates by place, and the least that the truth may be.

    The truth is held to be at least estimate - slack * (|first| + second), its two terms. Whatever is scored is
    compared with that: one that lies lower widens the slack for all, to more than the worst that was seen.

    estimates   place -> (estimate, what the candidate saved then)
    dearer      (score, nats) -> the score when every token costs so many nats more
    slack       so far; `missed` names what was found below its least
    """

    def __init__(self) -> None:
        self.estimates: dict[str, tuple[Estimate, float]] = {}
        self.dearer: Callable[[float, float], float | None] = lambda score, nats: None
        self.missed: list[str] = []
        self.slack, self.compared = SLACK, 0

    def take(self, found: Mapping[str, tuple[Estimate, float]], dearer: Callable[[float, float], float | None]) -> None:
        self.estimates, self.dearer = dict(found), dearer

    def __contains__(self, place: str) -> bool:
        return place in self.estimates

    def growths(self, candidate: Candidate, now: "Round") -> tuple[float, float]:
        """How much worse the score should be without it, and how much at least.

        A candidate that has become smaller since, a branch that was narrowed, is taken to cost less as well.
        """
        estimate, saved = self.estimates[candidate.place]
        share = min(1.0, candidate.saves("params") / saved) if saved > 0 else 1.0
        growth, terms = (share * self._growth(nats, now) for nats in (estimate.growth, estimate.terms))
        return growth, growth - self.slack * terms

    def learn(self, candidate: Candidate, growth: float, now: "Round") -> None:
        """Compare an estimate with what was scored."""
        expected, least = self.growths(candidate, now)
        terms = (expected - least) / self.slack
        if not terms > 0:
            return
        self.compared += 1
        if growth < least:
            self.missed.append(candidate.name)
        self.slack = max(self.slack, MARGIN * (expected - growth) / terms)

    def _growth(self, nats: float, now: "Round") -> float:
        score = self.dearer(now.base(), nats)
        assert score is not None, "a score that follows from nats was estimated"
        return now.sign * (score - now.base())


def foreseen(search: "Search", number: int, candidates: Sequence[Candidate], metric: MetricRef) -> Forecast | None:
    """Estimates by place, and how the score follows from them; None where it doesn't. Journalled under the number of
    the cut."""
    dearer, base = search.ctx.metric(metric).dearer, search.base(metric)
    if dearer(base, 0.0) is None:
        return None
    prefix = search.prefix(metric)

    def sweep() -> list[list[Any]]:
        if prefix.chain is None:  # the base came from the journal
            prefix.measure(lambda: search.ctx.metric(metric).measure(search.program.model, search.ctx))
        gradients = Gradients(prefix, search.ctx.seed)
        with search.ctx.scoring():
            told = search.ctx.each(gradients.estimates(candidates), "estimating candidates", len(candidates))
            return [[c.place, e.first, e.second] for c, e in told]

    found = {place: Estimate(*terms) for place, *terms in search.journal.remember(f"{number}:estimates", sweep)}
    return {c.place: (found[c.place], c.saves("params")) for c in candidates if c.place in found}, dearer

"""What is thought of candidates before they are scored, and how far it can be trusted."""

import math
from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ....dsl.checker.values import MetricRef
from .candidate import Candidate
from .gradients import Estimate, Gradients

if TYPE_CHECKING:
    from .choice import Round
    from .loop import Search

Forecast = tuple[Mapping[str, tuple[Estimate, float]], Callable[[float, float], float | None]]
SLACK = 0.5  # how far below an estimate the truth is taken to lie at most, of its terms' sizes, until FEW were scored
FEW = 8
TRUST = 0.9  # of the candidates that were scored, how many keep to the bound
MARGIN = 0.1  # what is put on top, of the terms' sizes


class Foresight:
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

    def take(self, found: Mapping[str, tuple[Estimate, float]], dearer: Callable[[float, float], float | None]) -> None:
        self.estimates, self.dearer = dict(found), dearer

    def __contains__(self, place: str) -> bool:
        return place in self.estimates

    def growths(self, candidate: Candidate, now: "Round") -> tuple[float, float]:
        """How much worse the score should be without it, and how much at least."""
        growth, terms = self._foreseen(candidate, now)
        return growth, growth - self.slack * terms

    def learn(self, candidate: Candidate, growth: float, now: "Round") -> None:
        """Compare an estimate with what was scored."""
        expected, terms = self._foreseen(candidate, now)
        if not (terms > 0 and math.isfinite(growth)):
            return
        if growth < expected - self.slack * terms:
            self.missed.append(candidate.name)
        insort(self._short, (expected - growth) / terms)
        few = len(self._short) < FEW
        worst = self._short[-1 if few else int(TRUST * len(self._short))]
        self.slack = max(SLACK if few else 0.0, worst + MARGIN)

    def _foreseen(self, candidate: Candidate, now: "Round") -> tuple[float, float]:
        """The growth that its estimate tells, and the size of its terms.

        A candidate that has become smaller since, a branch that was narrowed, is taken to cost less as well.
        """
        estimate, saved = self.estimates[candidate.place]
        share = min(1.0, candidate.saves("params") / saved) if saved > 0 else 1.0
        return share * self._growth(estimate.growth, now), share * self._growth(estimate.terms, now)

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

"""Whether a search fits the rows that it scores: by how many there are, by its own score, by a metric beside it."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ....dsl.checker.value_text import value_text
from ....dsl.checker.values import DataRef, MetricRef, references_in
from ....dsl.syntax.diagnostics import Fault
from ...core.events import Warned
from ...core.quantity import count_text, si_count, significant_digits
from ...core.warned import few_rows, fitted_rows

if TYPE_CHECKING:
    from ...plugin.context import Context
    from .loop import Search

too_few_rows = Fault(
    "too-few-rows",
    "A search is to remove far more than the tokens that it scores by can tell apart.\n\n"
    "Of SmolLM2-135M, 6.6 % that a search chose on 256 tokens of one kind cost text of that kind 2 % less than the "
    "published search, and other text 9 % more; on 512 tokens both were better. So a token may decide of 20,000 "
    "parameters, and 512 tokens of any number. `search: exact` decides as published, on whatever rows.",
)
PER_TOKEN = 20_000  # parameters that may go for every token of the score, up to `LEAST` tokens
LEAST = 512
ENOUGH = 1024  # tokens: what SmolLM2 needed so that cuts were as good on other text (docs/measurements.md)
FALLEN = 0.995  # of the whole model's score: less than that is no accident of rounding
FITTED = 1.25  # how many times faster than the score it may grow before that is said


def refuse_too_few_rows(metric: MetricRef, removed_param_count: float, ctx: "Context") -> None:
    """Raise Reject (too-few-rows) where a metric that reads tokens has fewer than `removed_param_count` parameters ask
    for."""
    if ctx.metric(metric).dearer(1.0, 0.0) is None:
        return
    least, tokens = min(LEAST, math.ceil(removed_param_count / PER_TOKEN)), token_count_of(metric, ctx)
    if tokens < least:
        raise too_few_rows(
            f"{value_text(metric)} reads {si_count(tokens)} tokens, too few to choose "
            f"{si_count(round(removed_param_count))} parameters by",
            help=f"give it {si_count(least)} or more, of more than one kind of text",
            argument="score",
        ).rejection()


def token_count_of(metric: MetricRef, ctx: "Context") -> int:
    """Number of tokens that a metric reads."""
    return sum(ctx.rows(ref).numel() for ref in references_in(dict(metric.args), DataRef))


@dataclass
class ScoreRowsCheck:
    """Overfit checks without other rows: before the first cut, and where the score improves as parts are removed.

    baseline  what the model scored when it was whole; None before it was scored, and for metrics that read no tokens
    """

    metric: MetricRef
    baseline: float | None = None
    warns: bool = True

    def remember_baseline(self, search: "Search") -> None:
        """Remember what the first cut is made of."""
        if self.baseline is None and self._reads_tokens(search):
            self.baseline = search.current_score(self.metric)

    def _reads_tokens(self, search: "Search") -> bool:
        return search.ctx.metric(self.metric).dearer(1.0, 0.0) is not None

    def warn_if_too_few_tokens(self, search: "Search") -> None:
        """Say, before anything is scored, that rows are too few."""
        if not self._reads_tokens(search):
            return
        tokens = token_count_of(self.metric, search.ctx)
        if tokens < ENOUGH:
            search.ctx.emit_event(
                Warned(
                    few_rows(
                        f"{value_text(self.metric)} reads {si_count(tokens)} tokens, which a search fits: other text "
                        "will lose more than the score says",
                        help=f"give it {si_count(ENOUGH)} or more, of more than one kind of text",
                    )
                )
            )

    def warn_once_if_score_improves(self, search: "Search", score: float) -> None:
        """Warn, once, of a score that is better without parts than with them."""
        if self.baseline is None or not self.warns or score > FALLEN * self.baseline:
            return
        self.warns = False
        search.program.note(fits=value_text(self.metric), cuts=len(search.cuts), begun=self.baseline, score=score)
        search.ctx.emit_event(
            Warned(
                fitted_rows(
                    f"{value_text(self.metric)} is {significant_digits(score)} after "
                    f"{count_text(len(search.cuts), 'cut')} and was {significant_digits(self.baseline)} before: "
                    "the search fits the score's rows, and other text will not agree",
                    help="give it more of them, or look at others by `check`",
                )
            )
        )


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoint of a search: share of its budget, the score and its metric, and the second metric."""

    share: float
    by: MetricRef
    score: float
    second: float


@dataclass
class OverfitCheck:
    """Second metric of a search: where it degrades more than the score, the search has overfitted the score's rows.

    goal    the whole search's
    every   share of it after which the metric is measured again
    """

    metric: MetricRef
    goal: float
    every: float = 0.25
    looks: list[Checkpoint] = field(default_factory=list)

    def measure_and_record_if_due(
        self, search: "Search", saved_amount: float, score_metric: MetricRef, is_last: bool = False
    ) -> None:
        """Measure if it is time to; `score_metric` is what the search scores by now."""
        share = round(saved_amount / self.goal, 6)
        if (
            self.looks
            and not is_last
            and share < self.looks[-1].share + self.every
            and score_metric == self.looks[-1].by
        ):
            return
        value = search.measure_journalled(f"{len(search.cuts)}:beside", self.metric)
        self.looks.append(Checkpoint(share, score_metric, search.current_score(score_metric), value))
        search.ctx.record(f"{value_text(self.metric)} after {count_text(len(search.cuts), 'cut')}", value)

    def note_and_warn_if_overfit(self, search: "Search") -> None:
        """Note what was seen, and warn where the metric grew much faster than the score since that was in use."""
        search.program.note(beside=value_text(self.metric), seen=[self._row(s) for s in self.looks])
        last = self.looks[-1]
        first = next(s for s in self.looks if s.by == last.by)
        if min(first.score, first.second, last.score) > 0:
            grown, fitted = last.second / first.second, last.score / first.score
            if grown > FITTED * fitted:
                search.ctx.emit_event(
                    Warned(
                        fitted_rows(
                            f"{value_text(self.metric)} grew {grown:.2f}-fold and {value_text(last.by)}, the score, "
                            f"{fitted:.2f}-fold: the search fitted the score's rows",
                            help="give it more of them",
                        )
                    )
                )

    def _row(self, entry: Checkpoint) -> list[Any]:
        return [entry.share, value_text(entry.by), entry.score, entry.second]

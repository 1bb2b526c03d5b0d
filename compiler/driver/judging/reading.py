"""Reading of rows, in random order, until they decide a bound `with 95% confidence`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

from ....dsl.checker.recipe import Bound
from ...core.quantity import count_text
from ...evaluation.sequential import FIRST, PairedBound, Verdict, row_order
from ...models.rows.batch_limit import retry_with_smaller_batches_on_oom
from ...plugin.row_scores import RowScores
from .scores import Score

if TYPE_CHECKING:
    from ...plugin.context import Context


@dataclass(frozen=True)
class SequentialReading:
    """Rows of both models that a test has read, and its verdict.

    interval  of the value, in its unit; None where there are too few rows
    total     rows that there are
    """

    score: Score
    original: Score | None
    verdict: Verdict
    interval: tuple[float, float] | None
    total: int

    @property
    def row_count_text(self) -> str:
        """`48 of 512 rows`."""
        assert self.score.rows is not None, "a test reads rows"
        return f"{len(self.score.rows.sums)} of {count_text(self.total, self.score.rows.noun)}"


def read_until_decided(
    bound: Bound, limit_value: float, metric: Any, model: Any, original: Any, ctx: "Context"
) -> SequentialReading:
    """Score rows of the result, and of the baseline where there is one, in random order until they decide a bound.

    limit_value   of the value, or the factor where there is a baseline
    """
    total, sign = metric.row_count(ctx), 1.0 if bound.op in ("<=", "<") else -1.0
    order, models = row_order(total, ctx.seed), [model] if original is None else [model, original]
    parts: list[list[RowScores]] = [[] for _ in models]
    test, read = None, 0
    while test is None or test.next_rows:
        size = test.next_rows if test else min(total, FIRST)
        for scores, scored_model in zip(parts, models, strict=True):
            batch = partial(metric.score_rows, scored_model, ctx, order[read : read + size])
            scores.append(retry_with_smaller_batches_on_oom(batch, ctx.settings.device, ctx.emit_event))
        read += size
        latest = [scores[-1] for scores in parts]
        test = test or _paired_bound(latest[0].form, limit_value, sign, bound, total)
        test.add([sign * d for d in _row_differences(latest, limit_value)], latest[0].counts)
    assert test.verdict is not None, f"{read} of {total} rows are no verdict"
    score, *baselines = (Score(rows.value, rows) for rows in map(_concatenated_row_scores, parts))
    baseline, interval = baselines[0] if baselines else None, test.interval()
    if interval is not None:
        interval = _interval_of_value(
            (min(sign * e for e in interval), max(sign * e for e in interval)), score, baseline, limit_value
        )
    return SequentialReading(score, baseline, test.verdict, interval, total)


def _paired_bound(score_form: str, limit: float, sign: float, bound: Bound, total: int) -> PairedBound:
    assert bound.confidence is not None, "a bound without confidence reads all rows"
    difference_limit = 0.0
    if score_form == "exp":
        difference_limit = sign * math.log(limit) if limit > 0 else -sign * math.inf
    worst, best = (-limit, 1.0) if bound.baseline else (-limit, 1.0 - limit)
    extremes = (min(sign * worst, sign * best), max(sign * worst, sign * best)) if score_form == "share" else None
    return PairedBound(total, difference_limit, bound.confidence, extremes)


def _row_differences(scores: Sequence[RowScores], limit: float) -> list[float]:
    """Of each row: nats more than the original's, or what the score is above the limit."""
    result, *originals = scores
    if result.form == "exp":
        return [a - b for a, b in zip(result.sums, originals[0].sums if originals else repeat(0.0), strict=False)]
    reference_sums = originals[0].sums if originals else result.counts
    return [a - limit * b for a, b in zip(result.sums, reference_sums, strict=True)]


def _concatenated_row_scores(parts: Sequence[RowScores]) -> RowScores:
    sums, counts = ([x for part in parts for x in getattr(part, name)] for name in ("sums", "counts"))
    return RowScores(sums, counts, parts[0].form, parts[0].noun)


def _interval_of_value(
    mean_difference_interval: tuple[float, float], score: Score, original: Score | None, limit: float
) -> tuple[float, float]:
    """Interval of the value by that of the mean difference."""
    if score.rows is not None and score.rows.form == "exp":
        scale = 1.0 if original is None else original.value
        return scale * math.exp(min(mean_difference_interval[0], 700.0)), scale * math.exp(
            min(mean_difference_interval[1], 700.0)
        )
    offset = limit if original is None else limit * original.value
    return mean_difference_interval[0] + offset, mean_difference_interval[1] + offset

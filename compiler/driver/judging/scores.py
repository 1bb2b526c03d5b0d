"""Measured values of a metric, with the scores of the rows that they are means of."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ...core.quantity import count_text
from ...core.safe_read import MALFORMED
from ...evaluation.confidence import metric_interval
from ...models.rows.batch_limit import retry_with_smaller_batches_on_oom
from ...plugin.row_scores import RowScores

if TYPE_CHECKING:
    from ...plugin.context import Context


@dataclass(frozen=True)
class Score:
    """Value of a metric for a model; `rows` of rowwise ones."""

    value: float
    rows: RowScores | None = None

    @property
    def row_count_text(self) -> str:
        """`60 questions`; "" where there are no rows."""
        return "" if self.rows is None else count_text(len(self.rows.sums), self.rows.noun)

    def interval(self, original: "Score | None" = None) -> tuple[float, float] | None:
        """95 % interval of the value, in its unit; beside an original it follows from the rows' differences to its.

        None of what has no rows, or too few.
        """
        if self.rows is None:
            return None
        if original is None or original.rows is None or not original.value:
            return metric_interval(self.rows)
        interval = metric_interval(self.rows, original.rows)
        return interval and (interval[0] * original.value, interval[1] * original.value)

    def to_json(self) -> Any:
        return self.value if self.rows is None else asdict(self.rows)

    @staticmethod
    def from_json(data: Any, rowwise: bool) -> "Score | None":
        """A score from the cache; None where it lacks the rows of a rowwise metric."""
        if not rowwise:
            return Score(float(data))
        try:
            rows = RowScores(**data)
            return Score(rows.value, rows)
        except MALFORMED:
            return None


def measure_score(metric: Any, model: Any, ctx: "Context") -> Score:
    """Score of a model, with fewer rows at once where a device is out of memory."""
    if metric.rowwise:
        rows = retry_with_smaller_batches_on_oom(
            partial(metric.score_rows, model, ctx), ctx.settings.device, ctx.emit_event
        )
        return Score(rows.value, rows)
    return Score(
        float(
            retry_with_smaller_batches_on_oom(partial(metric.measure, model, ctx), ctx.settings.device, ctx.emit_event)
        )
    )

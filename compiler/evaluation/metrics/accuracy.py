"""Accuracy of a model with a classification head."""

from collections.abc import Sequence

from torch import nn

from ....dsl.checker.values import DataRef
from ....dsl.syntax.diagnostics import Fault
from ...models.rows.classifier import classification_rows
from ...plugin.context import Context
from ...plugin.interfaces import Metric, param
from ...plugin.row_scores import RowScores

no_labels = Fault("no-labels", "Classes are judge_classes on data that says of no row which one it has.")


class Accuracy(Metric):
    """Accuracy of a model with a classification head.

    Of every row of `labels` the likeliest class counts. For questions with written answers there is `choice`.

    Source: own.
    Example: accuracy(reviews) >= 0.9
    """

    unit = ""
    better = "higher"
    lowest = 0.0
    highest = 1.0
    rowwise = True

    data: DataRef = param("Rows with a class each.", positional=True)

    def score_rows(self, model: nn.Module, ctx: Context, indices: Sequence[int] | None = None) -> RowScores:
        labels = ctx.labels(self.data)
        if labels is None:
            raise no_labels(f"`{self.data.name}` has no classes", help="declare it with `labels`").rejection()
        rows, lengths = ctx.rows(self.data), ctx.prompts(self.data)
        if indices is not None:
            some = list(indices)
            rows, labels, lengths = rows[some], labels[some], None if lengths is None else lengths[some]
        right = classification_rows(model, rows, lengths, labels, self.data.name)[1]
        return RowScores([float(r) for r in right], [1.0] * len(right), "share")

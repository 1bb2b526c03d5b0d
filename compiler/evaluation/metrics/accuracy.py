"""Accuracy of a model with a classification head."""

from torch import nn

from ....dsl.checker.values import DataRef
from ....dsl.syntax.diagnostics import Fault, Reject
from ...models.rows.classifier import classification_loss_and_accuracy
from ...plugin.context import Context
from ...plugin.interfaces import Metric, param

no_labels = Fault("no-labels", "Classes are judge_classes on data that says of no row which one it has.")


class Accuracy(Metric):
    """Accuracy of a model with a classification head.

    Of every row of `labels` the likeliest class counts. For questions with written answers there is `choice`.

    Source: own.
    Example: accuracy(reviews) >= 0.9
    """

    unit = ""
    better = "higher"

    data: DataRef = param("Rows with a class each.", positional=True)

    def measure(self, model: nn.Module, ctx: Context) -> float:
        labels = ctx.labels(self.data)
        if labels is None:
            raise Reject(no_labels(f"`{self.data.name}` has no classes", help="declare it with `labels`"))
        return classification_loss_and_accuracy(
            model, ctx.rows(self.data), ctx.prompts(self.data), labels, self.data.name
        )[1]

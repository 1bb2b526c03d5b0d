"""Accuracy on multiple-choice questions."""

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from ....dsl.checker.values import DataRef
from ....dsl.syntax.diagnostics import Fault
from ...inputs.data.choices import Choices, Item
from ...models.rows.forward import continuation_logprobs, finite
from ...plugin.context import Context
from ...plugin.interfaces import Metric, param
from ...plugin.row_scores import RowScores

no_choices = Fault("no-choices", "Accuracy is measured on data made by `choices`, which has questions with options.")


class Choice(Metric):
    """Accuracy on multiple-choice questions.

    The option whose tokens have the highest summed log-probability after the question counts as the model's
    answer; with `normalised`, the sum is divided by the option's length in characters first. From 0 to 1.

    Source: EleutherAI's lm-evaluation-harness, `acc` and `acc_norm`.
    Example: choice(arc, normalised: true) >= 0.95 * base
    """

    better: ClassVar[str] = "higher"
    lowest: ClassVar[float] = 0.0
    highest: ClassVar[float] = 1.0
    rowwise: ClassVar[bool] = True

    data: DataRef = param("Questions, made by `choices`.", rows_kind="questions with options", positional=True)
    normalised: bool = param("Divide by the option's length in characters.", default=False)

    def score_rows(self, model: nn.Module, ctx: Context, indices: Sequence[int] | None = None) -> RowScores:
        items = self._questions(ctx)
        items = items if indices is None else [items[i] for i in indices]
        requests = [(row, begin) for item in items for row, begin in zip(item.rows, item.starts, strict=True)]
        sums = iter(continuation_logprobs(model, requests))
        right = []
        for item in items:
            scores = [finite(next(sums), "choice", self.data.name) for _ in item.rows]
            if self.normalised:
                scores = [s / n for s, n in zip(scores, item.lengths, strict=True)]
            right.append(float(scores.index(max(scores)) == item.answer))
        return RowScores(right, [1.0] * len(items), "share", "question")

    def row_count(self, ctx: Context) -> int:
        return len(self._questions(ctx))

    def _questions(self, ctx: Context) -> list[Item]:
        data = ctx.data(self.data)
        if not isinstance(data, Choices):
            raise no_choices(
                f"`{self.data.name}` has rows, not questions with options", help="make it with `choices`"
            ).rejection()
        return data.tokenize_questions(ctx.tokenizer, ctx.relative_to(ctx.recipe.data[self.data.name]))

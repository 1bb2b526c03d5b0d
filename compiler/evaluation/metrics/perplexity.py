"""Perplexity of a model on text, per token."""

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from ....dsl.checker.values import DataRef
from ...models.rows.forward import finite, row_nll
from ...plugin.context import Context
from ...plugin.interfaces import Metric, param
from ...plugin.row_scores import RowScores


class Perplexity(Metric):
    """Perplexity of a model on text, per token.

    exp(nats / tokens) over all predicted tokens, each counted once: the first token of a row is given, not
    predicted. The loss is taken in float32 whatever the model computes in, sums in float64.

    Of rows of `pairs` the answers alone are counted, with the end token after them, as `tune.reft` learns them: prompts
    are given, and what fills a row up is no text. Interventions act on the prompts.

    Source: Jelinek et al. 1977, "Perplexity: a measure of the difficulty of speech recognition tasks".
    Example: perplexity(heldout) <= 1.15 * base
    """

    rowwise: ClassVar[bool] = True
    lowest: ClassVar[float] = 1.0

    data: DataRef = param("Rows to predict.", positional=True)

    def dearer(self, value: float, log_increase: float) -> float:
        return value * math.exp(min(log_increase, 80.0))

    def score_rows(self, model: nn.Module, ctx: Context, indices: Sequence[int] | None = None) -> RowScores:
        rows, answers, prompts = ctx.rows(self.data), ctx.answers(self.data), ctx.prompts(self.data)
        if indices is not None:
            some = list(indices)
            rows = rows[some]
            answers, prompts = (None if part is None else part[some] for part in (answers, prompts))
        nats, tokens = row_nll(model, rows, answers, prompts)
        scores = RowScores(nats, tokens, "exp")
        finite(math.fsum(nats), "perplexity", self.data.name)
        finite(scores.value, "perplexity", self.data.name)
        return scores

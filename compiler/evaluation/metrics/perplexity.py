"""Perplexity of a model on text, per token."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from ....dsl.checker.values import DataRef
from ...models.rows.decoding import decoded_row_nll
from ...models.rows.forward import finite, row_nll
from ...plugin.context import Context
from ...plugin.interfaces import Metric, param
from ...plugin.row_checks import invalid_rows
from ...plugin.row_scores import RowScores


class Perplexity(Metric):
    """Perplexity of a model on text, per token.

    exp(nats / tokens) over all predicted tokens, each counted once: the first token of a row is given, not
    predicted. The loss is taken in float32 whatever the model computes in, sums in float64.

    Of rows of `pairs` the answers alone are counted, with the end token after them, as `tune.reft` learns them: prompts
    are given, and padding, here and in rows of `texts` and `labels`, is no text. Interventions act on the prompts.

    With `decoded`, the last tokens of each row are fed one by one behind the others, as in generation, and they
    alone are counted: what a cache of keys and values forgets or rounds shows there, and nowhere else.

    Source: Jelinek et al. 1977, "Perplexity: a measure of the difficulty of speech recognition tasks".
    Example: perplexity(heldout) <= 1.15 * base
    """

    rowwise: ClassVar[bool] = True
    lowest: ClassVar[float] = 1.0

    data: DataRef = param("Rows to predict.", positional=True)
    decoded: int | None = param(
        "Last tokens of each row, fed one by one over the cache, which alone are counted; where it is left out, all "
        "tokens, read at once.",
        default=None,
        ge=1,
        unit="tokens",
    )

    def min_row_tokens(self) -> int:
        return 0 if self.decoded is None else self.decoded + 1

    def cannot_measure(self) -> Mapping[str, str]:
        return super().cannot_measure() if self.decoded is None else {}

    def dearer(self, value: float, log_increase: float) -> float:
        return value * math.exp(min(log_increase, 80.0))

    def score_rows(self, model: nn.Module, ctx: Context, indices: Sequence[int] | None = None) -> RowScores:
        rows, loss_mask, prompts = ctx.rows(self.data), ctx.loss_mask(self.data), ctx.prompts(self.data)
        if indices is not None:
            some = list(indices)
            rows = rows[some]
            loss_mask, prompts = (None if part is None else part[some] for part in (loss_mask, prompts))
        if self.decoded is None:
            nats, tokens = row_nll(model, rows, loss_mask, prompts)
        else:
            self._require_text_rows_longer_than(self.decoded, rows, is_text=loss_mask is None)
            nats, tokens = decoded_row_nll(model, rows, self.decoded)
        scores = RowScores(nats, tokens, "exp")
        finite(math.fsum(nats), "perplexity", self.data.name)
        finite(scores.value, "perplexity", self.data.name)
        return scores

    def _require_text_rows_longer_than(self, n_decoded: int, rows: Tensor, is_text: bool) -> None:
        if not is_text or rows.dim() != 2 or rows.is_floating_point():
            raise invalid_rows(
                f"`decoded` counts the last tokens of whole rows of text, and rows of `{self.data.name}` are of "
                "another kind, or padded",
                help="leave `decoded` out, or read the file by `text`",
            ).rejection()
        if rows.shape[1] <= n_decoded:
            raise invalid_rows(
                f"`decoded: {n_decoded}` leaves no prompt: rows of `{self.data.name}` have {rows.shape[1]} tokens",
                help=f"at most `decoded: {rows.shape[1] - 1}`",
            ).rejection()

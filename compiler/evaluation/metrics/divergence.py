"""KL divergence of a model's predictions from the original's."""

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from ....dsl.checker.values import DataRef
from ...models.rows.forward import finite
from ...plugin.context import Context
from ...plugin.interfaces import Metric, param
from ...plugin.row_scores import RowScores, sums_and_counts
from ..reference import kl_divergences, load_or_make_reference


class Divergence(Metric):
    """KL divergence of a model's predictions from the original's.

    Mean over all positions of KL(original || model) in nats: what the model's next-token distribution costs
    where the original's is true. It sees damage that perplexity, which looks at one token of each position,
    averages away. 0 for the original.

    Source: Kullback and Leibler 1951, "On information and sufficiency".
    Example: divergence(heldout) <= 0.05
    """

    unit: ClassVar[str] = "nats/token"
    lowest: ClassVar[float] = 0.0
    needs_original: ClassVar[bool] = True
    rowwise: ClassVar[bool] = True

    data: DataRef = param("Rows to predict.", positional=True)

    def score_rows(self, model: nn.Module, ctx: Context, indices: Sequence[int] | None = None) -> RowScores:
        rows, reference = ctx.rows(self.data), load_or_make_reference(ctx, self.data)
        lengths = ctx.text_lengths(self.data)
        if indices is not None:
            rows, reference = rows[list(indices)], reference.of_rows(indices)
            lengths = None if lengths is None else lengths[list(indices)]
        sums, counts = sums_and_counts(kl_divergences(model, rows, reference, "divergence"), rows.shape[1], lengths)
        finite(math.fsum(sums), "divergence", self.data.name)
        return RowScores(sums, counts)

"""Share of positions at which a model's most probable token is the original's."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from ....dsl.checker.values import DataRef
from ...models.rows.forward import evaluating, finite, logits, memory_batches
from ...plugin.context import Context
from ...plugin.interfaces import Metric, param
from ...plugin.row_scores import RowScores, sums_and_counts
from ..reference import load_or_make_reference


class Agreement(Metric):
    """Share of positions at which a model's most probable token is the original's.

    The share of positions, from 0 to 1, where both would choose the same next token under greedy decoding,
    given the same text before it.

    Source: Dutta et al. 2024, "Accuracy is not all you need" (arXiv 2407.09141): flips.
    Example: agreement(heldout) >= 0.9
    """

    better: ClassVar[str] = "higher"
    lowest: ClassVar[float] = 0.0
    highest: ClassVar[float] = 1.0
    needs_original: ClassVar[bool] = True
    rowwise: ClassVar[bool] = True

    data: DataRef = param("Rows to predict.", positional=True)

    def score_rows(self, model: nn.Module, ctx: Context, indices: Sequence[int] | None = None) -> RowScores:
        rows, top, lengths = (
            ctx.rows(self.data),
            load_or_make_reference(ctx, self.data).top,
            ctx.text_lengths(self.data),
        )
        if indices is not None:
            rows, top = rows[list(indices)], top[list(indices)]
            lengths = None if lengths is None else lengths[list(indices)]
        same, at = [], 0
        with evaluating(model):
            for batch in memory_batches(model, rows):
                values = logits(model, batch)  # [b, t, vocab]
                best, token = values.max(-1)
                finite(best.float().sum().item(), "agreement", self.data.name)
                same.append(token.cpu() == top[at : at + len(batch)])  # [b, t]
                at += len(batch)
        sums, counts = sums_and_counts(torch.cat(same).double(), rows.shape[1], lengths)
        return RowScores(sums, counts, "mean" if top[0].numel() > 1 else "share")

"""Retrieval quality: how well a model finds, for each text, its counterpart."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ....dsl.checker.values import DataRef
from ....dsl.syntax.diagnostics import Fault
from ...inputs.data.texts import Texts
from ...models.rows.encoder_states import pooled_state_batches, resolve_pooling_name
from ...models.rows.forward import finite
from ...plugin.context import Context
from ...plugin.interfaces import Metric, param
from ...plugin.row_scores import RowScores

no_partners = Fault(
    "no-partners", "Retrieval is measured on data made by `texts` from two fields: texts and what is sought."
)


class Retrieval(Metric):
    """Retrieval quality: how well a model finds, for each text, its counterpart.

    Each text of the first field of `texts` is compared with all of the second by the cosine of their vectors.
    `recall` is the share whose own partner is the nearest, `mrr` the mean of 1 / rank of the partner. A tie counts
    against the model.

    Source: recall@1 and mean reciprocal rank as in BEIR (Thakur et al. 2021, arXiv 2104.08663); vectors as in
    sentence-transformers.
    Example: retrieval(questions) >= 0.95 * base
    """

    better: ClassVar[str] = "higher"
    lowest: ClassVar[float] = 0.0
    highest: ClassVar[float] = 1.0
    rowwise: ClassVar[bool] = True

    data: DataRef = param(
        "Texts and their partners, made by `texts` from two fields.", rows_kind="texts", positional=True
    )
    score: Literal["recall", "mrr"] = param("First place alone, or 1 / rank.", default="recall")
    pooling: Literal["auto", "mean", "first", "last", "max", "own"] = param(
        "How states of tokens become the vector of a text: see `similarity`.", default="auto"
    )

    def row_count(self, ctx: Context) -> int:
        return len(ctx.rows(self.data)) // 2

    def score_rows(self, model: nn.Module, ctx: Context, indices: Sequence[int] | None = None) -> RowScores:
        data = ctx.data(self.data)
        if not isinstance(data, Texts) or len(data.fields) != 2:
            raise no_partners(
                f"`{self.data.name}` has no texts with a partner each",
                help='make it with `texts`, and name two: `fields: ["question", "answer"]`',
            ).rejection()
        pooling = resolve_pooling_name(ctx.origin.folder, self.pooling)
        pooled = [
            reciprocal.pooled.double() for reciprocal in pooled_state_batches(model, ctx.rows(self.data), pooling)
        ]
        queries, sought = nn.functional.normalize(torch.cat(pooled), dim=-1).chunk(2)
        reciprocal = 1.0 / ranks_of_matching_columns(queries @ sought.T)
        finite(float(reciprocal.sum()), "retrieval", self.data.name)
        scores = (reciprocal if self.score == "mrr" else reciprocal.floor()).tolist()
        scores = scores if indices is None else [scores[i] for i in indices]  # each among all texts
        return RowScores(scores, [1.0] * len(scores), "mean" if self.score == "mrr" else "share", "text")


def ranks_of_matching_columns(similarity: Tensor) -> Tensor:
    """The place of each row's own column [n] among all, from 1; equal ones come before it."""
    return (similarity >= similarity.diagonal()[:, None]).sum(1).double()

"""Cosine similarity of a model's hidden states to the original's."""

from typing import ClassVar, Literal

from torch import nn

from ....dsl.checker.values import DataRef
from ...models.rows.encoder_states import resolve_pooling_name
from ...plugin.context import Context
from ...plugin.interfaces import Metric, param
from .. import similarity


class Similarity(Metric):
    """Cosine similarity of a model's hidden states to the original's.

    For models without a head: sentence embedders, image towers, the encoder of a larger model. 1.0 is the original
    itself. `of: pooled` compares one vector for each row, `tokens` the last layer's state of every token that is no
    padding, `both` takes the mean of the two. By `cosine` states have to point where the original's do, as an index
    that was made with it asks; `cka` (linear centred kernel alignment) forgives what turns or scales them all alike,
    and compares states that are narrower, too, as the last ones of a convolutional net may become.

    `pooling: auto` does what 1_Pooling/config.json of a folder of sentence-transformers says, and takes the mean
    where there is none; `own` is what the model itself calls `pooler_output`. Of a model with a head, the states
    below it count.

    Source: cosine as in sentence-transformers (Reimers and Gurevych 2019, arXiv 1908.10084); linear CKA: Kornblith
    et al. 2019 (arXiv 1905.00414).
    Example: similarity(calib) >= 0.98
    """

    better: ClassVar[str] = "higher"
    lowest: ClassVar[float] = -1.0
    highest: ClassVar[float] = 1.0
    needs_original: ClassVar[bool] = True
    compares: ClassVar[str] = "states"

    data: DataRef = param("Rows to encode.", positional=True)
    of: Literal["both", "pooled", "tokens"] = param("Vectors of rows, states of tokens, or both.", default="both")
    by: Literal["cosine", "cka"] = param("How states are compared.", default="cosine")
    pooling: Literal["auto", "mean", "first", "last", "max", "own"] = param(
        "How states of tokens become the vector of a row.", default="auto"
    )

    def measure(self, model: nn.Module, ctx: Context) -> float:
        original = similarity.load_or_make_states(ctx, self.data, self.pooling)
        measured = similarity.mean_cosine if self.by == "cosine" else similarity.linear_cka
        pooled, tokens = measured(
            model, ctx.rows(self.data), original, resolve_pooling_name(ctx.origin.folder, self.pooling)
        )
        return {"pooled": pooled, "tokens": tokens, "both": (pooled + tokens) / 2}[self.of]

"""How far a model's predictions are from the original's."""

from typing import ClassVar

from torch import nn

from ...dsl.values import DataRef
from ..context import Context
from ..evaluate import finite
from ..kinds import Metric, param
from ..reference import compared, load


class Divergence(Metric):
    """How far a model's predictions are from the original's.

    Mean over all positions of KL(original || model) in nats: what the model's next-token distribution costs
    where the original's is true. It sees damage that perplexity, which looks at one token of each position,
    averages away. 0 for the original.

    Source: Kullback and Leibler 1951, "On information and sufficiency".
    Example: divergence(heldout) <= 0.05
    """

    unit: ClassVar[str] = "nats/token"
    needs_original: ClassVar[bool] = True

    data: DataRef = param("Rows to predict.", positional=True)

    def measure(self, model: nn.Module, ctx: Context) -> float:
        rows = ctx.rows(self.data)
        total, count = 0.0, 0
        for ours, theirs in compared(model, rows, load(ctx, self.data), "divergence"):
            q, p = ours.log_softmax(-1), theirs.log_softmax(-1)                # [c, vocab]
            total += nn.functional.kl_div(q, p, reduction="sum", log_target=True).item()
            count += len(q)
        # Rounding of float32 sums may fall below 0, which no divergence does.
        return max(finite(total / count, "divergence", self.data.name), 0.0)

"""How many numbers a model holds."""

from typing import ClassVar

from torch import nn

from ..context import Context
from ..kinds import Metric


class Params(Metric):
    """How many numbers a model holds.

    Parameters, each counted once where modules share it; buffers are not counted. A weight that is zero counts
    as long as it is there: see `bytes` for what sparsity saves.

    Source: own.
    Example: params <= 0.80 * base
    """

    unit: ClassVar[str] = "params"
    exact: ClassVar[bool] = True

    def measure(self, model: nn.Module, ctx: Context) -> float:
        return sum(p.numel() for p in model.parameters())

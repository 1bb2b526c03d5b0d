"""Bytes of a model's weights."""

from typing import ClassVar

from torch import Tensor, nn

from ...ir.weights import HasWeightSizes, distinct_tensors
from ...plugin.context import Context
from ...plugin.interfaces import Metric


class Bytes(Metric):
    """Bytes of a model's weights.

    Parameters and the buffers that a checkpoint keeps, as they are stored: packed sparse and quantized weights
    count as packed. Shared tensors count once.

    Source: own.
    Example: bytes <= 0.5 * base
    """

    unit: ClassVar[str] = "B"
    exact: ClassVar[bool] = True
    lowest: ClassVar[float] = 1

    def measure(self, model: nn.Module, ctx: Context) -> float:
        if isinstance(model, HasWeightSizes) and model.stored_bytes is not None:
            return model.stored_bytes
        return sum(t.nbytes for _, t in distinct_tensors(model) if isinstance(t, Tensor))

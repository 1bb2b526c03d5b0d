"""How many bytes a model's weights take."""

from typing import ClassVar

from torch import Tensor, nn

from ..words.context import Context
from ..words.kinds import Metric


class Bytes(Metric):
    """How many bytes a model's weights take.

    Parameters and the buffers that a checkpoint keeps, as they are stored: packed sparse and quantized weights
    count as packed. Shared tensors count once.

    Source: own.
    Example: bytes <= 0.5 * base
    """

    unit: ClassVar[str] = "B"
    exact: ClassVar[bool] = True

    def measure(self, model: nn.Module, ctx: Context) -> float:
        # A state dict holds what a checkpoint holds; two views of one storage start at one address.
        held = [t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in {id(t): t for t in held}.values())

"""How many numbers a model holds."""

from typing import ClassVar

from torch import nn

from ..layers.linear import params
from ..native.model import NativeModel
from ..onnx.model import OnnxModule
from ..words.context import Context
from ..words.kinds import Metric


class Params(Metric):
    """How many numbers a model holds.

    Parameters, each counted once where modules share it; buffers are not counted, but the weights that a kernel's
    packed one stands for are. A weight that is zero counts as long as it is there: see `bytes` for what sparsity
    saves.

    Source: own.
    Example: params <= 0.80 * base
    """

    unit: ClassVar[str] = "params"
    exact: ClassVar[bool] = True

    def measure(self, model: nn.Module, ctx: Context) -> float:
        if isinstance(model, (NativeModel, OnnxModule)):  # their weights are no parameters
            return model.facts["params"]
        return params(model)

"""Number of parameters of a model."""

from typing import ClassVar

from torch import nn

from ....dsl.syntax.diagnostics import Fault
from ...ir.layers.linear import count_params
from ...ir.weights import HasWeightSizes
from ...plugin.context import Context
from ...plugin.interfaces import Metric

params_untold = Fault(
    "params-untold",
    "An exported program has packed weights, and does not say how many numbers it holds.\n\n"
    "Which packed weights stand for numbers that an embedding has already is known only where they were packed. "
    "Programs that were written before effc noted it have to be written again.",
    exit="environment",
)


class Params(Metric):
    """Number of parameters of a model.

    Parameters, each counted once where modules share it; buffers are not counted, but the weights that a kernel's
    packed one stands for are. A weight that is zero counts as long as it is there: see `bytes` for what sparsity
    saves.

    Source: own.
    Example: params <= 0.80 * base
    """

    unit: ClassVar[str] = "params"
    exact: ClassVar[bool] = True
    lowest: ClassVar[float] = 1

    def measure(self, model: nn.Module, ctx: Context) -> float:
        if not isinstance(model, HasWeightSizes):
            return count_params(model)
        if model.n_params is None:
            raise params_untold(
                "the exported program does not say how many numbers its packed weights stand for",
                help="compile it again with this effc",
            ).rejection()
        return model.n_params

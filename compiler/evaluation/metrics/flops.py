"""Number of operations per decoded token."""

from typing import ClassVar

from torch import nn

from ...analysis.discovery.discover import skeleton_of
from ...analysis.planning.shrink import flops_per_token
from ...ir.capture.capture import capture
from ...plugin.context import Context
from ...plugin.interfaces import Metric, param


class Flops(Metric):
    """Number of operations per decoded token, or per image.

    Multiplications and additions of the matrix products, counted on the model's structure: two per weight that
    takes part (of experts: the active ones), and the products of attention over `context` positions. Zeros
    count. Of a model that takes images alone they are those of an image of the size that its config or its
    `dummy_inputs` have: a weight of a convolution takes part at every position of its output.

    Source: Kaplan et al. 2020 (arXiv 2001.08361), section 2.1.
    Example: flops(context: 512) <= 0.7 * base
    """

    unit: ClassVar[str] = "FLOP"
    exact: ClassVar[bool] = True
    lowest: ClassVar[float] = 1

    context: int = param("Positions that the token attends to.", default=512, ge=0, unit="tokens")

    def measure(self, model: nn.Module, ctx: Context) -> float:
        return flops_per_token(skeleton_of(capture(model)), self.context)

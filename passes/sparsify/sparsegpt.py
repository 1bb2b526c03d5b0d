"""Make weights of linear modules zero, and let the weights behind each make up for it."""

from functools import partial
from typing import Literal

from ...compiler.ir.program import Program
from ...compiler.search.solving import Zeros
from ...compiler.search.updates import sparsegpt
from ...compiler.words.context import Context
from ...compiler.words.kinds import Effort, Lossy, Pass, param
from ...dsl.skeleton import Skeleton
from ...dsl.values import DataRef, Ratio, Selector


class SparseGpt(Pass):
    """Make weights of linear modules zero, and let the weights behind each make up for it.

    Inputs are settled from the first to the last. In blocks of 128 those weights become zero that the outputs
    miss least, and what they gave is taken over by the weights of later inputs, as well as these can over
    `data`. Inputs that are always zero lose their weights; 1% of the mean of the inputs' squares is added to
    each, so that nearly equal inputs don't cancel each other. Layers go from the first to the last, each for
    what those before it give now. A killed run goes on at the layer where it was. Without such an update
    `sparsify.wanda` is faster; `sparsify.admm` moves all weights and loses less.

    `allocation: owl` leaves more in layers with more outlying weights, `allocation: searched` where zeros in
    one layer alone move the model's predictions more; the share over all layers stays what was asked.

    Source: SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774).
    Example: sps = sparsify.sparsegpt(on: "*_proj", sparsity: 50% of weights, data: calib)
    """

    keeps = Lossy()
    acts_on = "linear"
    determinism = "deterministic"

    sparsity: Ratio = param("Share of the weights that become zero.", of=("weights",), gt=0, lt=1)
    data: DataRef = param("Rows whose inputs of the modules count; more tokens than a module has inputs.")
    on: Selector | None = param("Linear modules; all inside the layers where it is left out.", default=None)
    pattern: Literal["any", "2:4", "4:8"] = param(
        "Any weights, or two of every four or four of every eight inputs of an output.", default="any"
    )
    allocation: Literal["uniform", "owl", "searched"] = param(
        "How zeros spread over the layers: alike, by outliers, or by what they cost there.", default="uniform"
    )
    damping: float = param("What is added to the inputs' squares, as a share of their mean.", default=0.01, gt=0)

    def run(self, program: Program, ctx: Context) -> None:
        self._zeros.make(
            program, ctx, ctx.rows(self.data), partial(sparsegpt, pattern=self.pattern, damping=self.damping)
        )

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        """The same shapes. What the pattern doesn't fit is said here, before any weight is read."""
        self._zeros.chosen(skeleton)
        return skeleton

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        return self._zeros.effort(skeleton, ctx.rows(self.data))

    @property
    def _zeros(self) -> Zeros:
        return Zeros(self.on, self.sparsity, self.pattern, self.allocation)

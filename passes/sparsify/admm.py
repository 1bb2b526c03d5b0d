"""Make weights of linear modules zero while all others move to keep the outputs."""

from functools import partial
from typing import Literal

from ...compiler.ir.program import Program
from ...compiler.search.solving import Zeros
from ...compiler.search.updates import admm
from ...compiler.words.context import Context
from ...compiler.words.kinds import Effort, Lossy, Pass, param
from ...dsl.skeleton import Skeleton
from ...dsl.values import DataRef, Ratio, Selector


class Admm(Pass):
    """Make weights of linear modules zero while all others move to keep the outputs.

    Two copies of a weight are pulled together, round by round: one that gives the outputs over `data`, and one
    with zeros, few at first and then as many as asked. All weights of an output move, where
    `sparsify.sparsegpt` moves only those behind a zero, and the choice of zeros follows what has moved
    already. Layers go from the first to the last, each for what those before it give now. A killed run goes
    on at the layer where it was.

    `allocation: owl` leaves more in layers with more outlying weights, `allocation: searched` where zeros in
    one layer alone move the model's predictions more; the share over all layers stays what was asked.

    Source: Boza 2024 (arXiv 2401.02938); alternating directions are Boyd et al. 2011, "Distributed Optimization
    and Statistical Learning via the Alternating Direction Method of Multipliers".
    Example: sps = sparsify.admm(on: "*_proj", sparsity: 50% of weights, data: calib, allocation: searched)
    """

    keeps = Lossy()
    acts_on = "linear"
    determinism = "deterministic"

    sparsity: Ratio = param("Share of every output's weights that become zero.", of=("weights",), gt=0, lt=1)
    data: DataRef = param("Rows whose inputs of the modules count; more tokens than a module has inputs.")
    on: Selector | None = param("Linear modules; all inside the layers where it is left out.", default=None)
    pattern: Literal["any", "2:4", "4:8"] = param(
        "Any weights, or two of every four or four of every eight inputs of an output.", default="any"
    )
    allocation: Literal["uniform", "owl", "searched"] = param(
        "How zeros spread over the layers: alike, by outliers, or by what they cost there.", default="uniform"
    )
    damping: float = param("What is added to the inputs' squares, as a share of each.", default=0.01, gt=0)

    def run(self, program: Program, ctx: Context) -> None:
        self._zeros.make(program, ctx, ctx.rows(self.data), partial(admm, pattern=self.pattern, damping=self.damping))

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        """The same shapes. What the pattern doesn't fit is said here, before any weight is read."""
        self._zeros.chosen(skeleton)
        return skeleton

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        return self._zeros.effort(skeleton, ctx.rows(self.data))

    @property
    def _zeros(self) -> Zeros:
        return Zeros(self.on, self.sparsity, self.pattern, self.allocation)

"""Make weights of linear modules zero while all others move to keep the outputs."""

from torch import Tensor

from ...compiler.plugin.interfaces import param
from ...compiler.transforms.search.solving import ReconstructingSparsifier
from ...compiler.transforms.search.updates import solve_admm
from ...dsl.checker.values import Ratio


class Admm(ReconstructingSparsifier):
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

    sparsity: Ratio = param("Share of every output's weights that become zero.", of=("weights",), gt=0, lt=1)
    damping: float = param("What is added to the inputs' squares, as a share of each.", default=0.01, gt=0)

    def solve(self, weight: Tensor, gram: Tensor, sparsity: float) -> Tensor:
        return solve_admm(weight, gram, sparsity, pattern=self.pattern, damping_share=self.damping)

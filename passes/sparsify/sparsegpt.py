"""Make weights of linear modules zero, and let the weights behind each make up for it."""

from torch import Tensor

from ...compiler.plugin.interfaces import param
from ...compiler.transforms.search.solving import ReconstructingSparsifier
from ...compiler.transforms.search.updates import solve_sparsegpt


class SparseGpt(ReconstructingSparsifier):
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

    damping: float = param("What is added to the inputs' squares, as a share of their mean.", default=0.01, gt=0)

    def solve(self, weight: Tensor, gram: Tensor, sparsity: float) -> Tensor:
        return solve_sparsegpt(weight, gram, sparsity, pattern=self.pattern, damping_share=self.damping)

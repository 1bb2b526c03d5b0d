"""Remove the scans of state-space mixers, and all that only they need."""

from ...compiler.analysis.planning.selection import scans
from ...compiler.plugin.interfaces import param
from ...compiler.transforms.search.block_pruner import BlockPruner
from ...compiler.transforms.search.greedy import GreedySearch
from ...compiler.transforms.search.parts import ScanParts
from ...dsl.checker.skeleton import Skeleton
from ...dsl.checker.values import Ratio, Selector


class Ssm(BlockPruner):
    """Remove the scans of state-space mixers, and all that only they need.

    A mixer without its scan hands on what came out of its convolution and activation: y = x; gate, norm and output
    projection stay. B, C, time step, decay and skip are then read by nobody, so the rows of the input projection, the
    channels of the convolution, `x_proj`, `dt_proj`, `A_log`, `D` and `dt_bias` that made them go too, and the cache
    keeps the convolution's last few inputs only. What was the slow part of a layer on a CPU is gone, and much of what
    a layer computes stays: on trained models late layers often need their scan least.

    Scans are scored by running the model without them; the one that is missed least goes, again and again. The last
    scan of a model always stays. The result has its true shapes in a `compact` checkpoint that `effc.load` reads; the
    `compat` one beside it gives the same logits in plain transformers, with C = 0 and D = 1 in place of a scan.

    Source: Mamba-Shedder (Munoz et al. 2025, arXiv 2501.17088), section 3, with `search: exact`; there dead weights
    stay. Racing, budgets of params, flops and bytes: own.
    Example: shed = shed.ssm(remove: 2, score: perplexity(calib))
    """

    acts_on = "scans"
    changes = ("weights", "branches")
    makes = ("missing scans",)

    remove: int | Ratio = param(
        "How many scans to remove, or what share of them or of the whole model.",
        of=("scans", "params", "flops", "bytes"),
        ge=1,
        unit="scans",
    )
    on: Selector | None = param("Which mixers may lose their scan.", default=None)

    def make_search(self, skeleton: Skeleton) -> GreedySearch:
        parts = ScanParts("scans", all=len(skeleton.scans), scans=scans(skeleton, self.on))
        return self.removal_search(self.remove, "scans", parts)

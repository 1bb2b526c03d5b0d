"""Remove heads of Mamba-2 scans."""

from ...compiler.analysis.planning.selection import groups
from ...compiler.plugin.interfaces import param
from ...compiler.transforms.search.compensation import FitSettings
from ...compiler.transforms.search.greedy import GreedySearch
from ...compiler.transforms.search.parts import SliceParts
from ...compiler.transforms.search.width_pruner import WidthPruner
from ...dsl.checker.skeleton import Skeleton
from ...dsl.checker.values import DataRef, Ratio, Selector


class Heads(WidthPruner):
    """Remove heads of Mamba-2 scans.

    A head is a block of channels that share a time step: with it go its rows of gate, x and dt in the input
    projection, its channels of the convolution, its decay, skip and bias, its part of the norm and its columns of the
    output projection; the cache keeps one state less. Where B and C come in groups every group keeps the same number
    of heads. Mamba-1 has no heads: every channel has a time step of its own, see `shed.channels`.

    The norm behind the scan takes its mean over the heads that are left, so the model that results is scored, not one
    with silenced heads: a trial has the very shape of the result. (Zeroing a head's gate, and scaling the norm's
    weight by the root of the share that is left and its epsilon by that share, gives the same outputs to 1e-4.)

    Without a score every mixer keeps the same share and the heads of least weight magnitude go. With one mixers
    compete, a step at a time; the score's rows decide which heads of a mixer go first, by the error that their
    removal leaves in the output projection.

    Source: own; Mamba-Shedder (Munoz et al. 2025, arXiv 2501.17088) stops at whole scans.
    Example: bald = shed.heads(keep: 75% of heads, score: perplexity(calib))
    """

    acts_on = "ssm_heads"
    uneven = "uneven scans"

    keep: Ratio = param(
        "Share of the heads, or with a score of the whole model, that stays.",
        of=("heads", "params", "flops", "bytes"),
        gt=0,
        le=1,
    )
    on: Selector | None = param("Which mixers.", default=None)
    step: int = param("Heads of every group per cut.", default=1, ge=1, unit="heads")
    data: DataRef | None = param("Rows that heads are ranked on; unless given, 32 that the model writes.", default=None)

    def make_search(self, skeleton: Skeleton) -> GreedySearch:
        chosen = groups(skeleton, "ssm_heads", self.on)
        parts = SliceParts("ssm_heads", groups=chosen, step=self.step)
        return self.narrowing_search(self.keep, parts, FitSettings("obs", False, self.data), self.step)

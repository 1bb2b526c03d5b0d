"""Make the inner width of Mamba-1 mixers smaller."""

from ...compiler.analysis.planning.selection import groups
from ...compiler.plugin.interfaces import param
from ...compiler.transforms.search.compensation import FitSettings
from ...compiler.transforms.search.greedy import GreedySearch
from ...compiler.transforms.search.parts import SliceParts, WidthParts
from ...compiler.transforms.search.width_pruner import WidthPruner
from ...dsl.checker.skeleton import Skeleton
from ...dsl.checker.values import DataRef, Ratio, Selector


class Channels(WidthPruner):
    """Make the inner width of Mamba-1 mixers smaller.

    A channel of a Mamba-1 mixer (of Mamba, FalconMamba, Jamba) has a time step and a state of its own: with it go its
    row and its gate's row of the input projection, its filter of the convolution, its rows of `dt_proj`, `A_log` and
    `D`, and its columns of `x_proj` and of the output projection; the cache keeps one row less. Channels of Mamba-2
    come in heads that share a time step, see `shed.heads`.

    Without a score every mixer keeps the same share and the channels of least weight magnitude go, which leaves a
    stock checkpoint where the config has a word for the width. With one mixers compete, `align` channels at a time;
    the score's rows decide which go first, and what reads them is refitted by least squares to do without.

    Source: own; the search as in `prune.channels`.
    Example: thin = shed.channels(keep: 75% of channels, align: 32)
    """

    acts_on = "ssm_channels"
    uneven = "uneven scans"

    keep: Ratio = param(
        "Share of the channels, or with a score of the whole model, that stays.",
        of=("channels", "params", "flops", "bytes"),
        gt=0,
        le=1,
    )
    on: Selector | None = param("Which mixers.", default=None)
    align: int = param(
        "Widths are multiples of this where they were, and it is the step of the search.",
        default=16,
        ge=1,
        unit="channels",
    )
    repair: bool = param("With a score, refit what reads the channels that go.", default=True)
    data: DataRef | None = param(
        "Rows that rank channels and refit readers; unless given, 32 that the model writes.", default=None
    )

    def make_search(self, skeleton: Skeleton) -> GreedySearch:
        chosen = groups(skeleton, "ssm_channels", self.on)
        parts = (WidthParts if self.repair else SliceParts)("ssm_channels", groups=chosen, step=self.align)
        return self.narrowing_search(self.keep, parts, FitSettings("obs", self.repair, self.data), self.align)

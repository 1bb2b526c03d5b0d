"""Let the scans of state-space mixers keep fewer states."""

from ...compiler.analysis.planning.selection import groups
from ...compiler.plugin.interfaces import param
from ...compiler.transforms.search.compensation import FitSettings
from ...compiler.transforms.search.greedy import GreedySearch
from ...compiler.transforms.search.parts import SliceParts
from ...compiler.transforms.search.width_pruner import WidthPruner
from ...dsl.checker.skeleton import Skeleton
from ...dsl.checker.values import Ratio, Selector


class State(WidthPruner):
    """Let the scans of state-space mixers keep fewer states.

    What a scan remembers of a channel is a row of numbers, written by B and read by C. A state that goes takes its
    rows of B and C along, in the input projection and the convolution of Mamba-2 or in `x_proj` and `A_log` of
    Mamba-1; scan time and cache shrink with it, other weights stay as they are. A model that lacks a state is exactly
    the one in which C never reads it. Where B and C come in groups every group keeps the same number. Where a norm
    runs over B and C (FalconMamba, Jamba) it takes its mean over the states that are left, so the model that results is
    scored, not one with silenced states.

    Without a score every scan keeps the same share and the states with the smallest weights go, which leaves a stock
    checkpoint where the config has a word for the size. With one scans compete, `step` states at a time.

    Source: own.
    Example: brief = shed.state(keep: 75% of states)
    """

    acts_on = "ssm_state"
    uneven = "uneven scans"

    keep: Ratio = param(
        "Share of the states, or with a score of the whole model, that stays.",
        of=("states", "params", "flops", "bytes"),
        gt=0,
        le=1,
    )
    on: Selector | None = param("Which mixers.", default=None)
    step: int = param("States of every group per cut.", default=4, ge=1, unit="states")

    def make_search(self, skeleton: Skeleton) -> GreedySearch:
        chosen = groups(skeleton, "ssm_state", self.on)
        parts = SliceParts("ssm_state", groups=chosen, step=self.step)
        return self.narrowing_search(self.keep, parts, FitSettings("obs", False), self.step)

"""Make MLPs narrower."""

from ...compiler.analysis.planning.amount import Amount
from ...compiler.analysis.planning.selection import groups, reject_if_model_has_none
from ...compiler.plugin.interfaces import param
from ...compiler.transforms.search.greedy import GreedySearch, total_step_count
from ...compiler.transforms.search.parts import WidthParts
from ...compiler.transforms.search.width_pruner import RefittingPruner
from ...dsl.checker.skeleton import Skeleton
from ...dsl.checker.values import Ratio, Selector


class Channels(RefittingPruner):
    """Make MLPs narrower.

    Without a score every layer keeps the same share, the channels of least weight magnitude go, and the
    checkpoint stays a stock one; on a trained model that costs much, so `tune.heal` it. With a score the layers
    compete: `align` channels go from the layer where the model's loss suffers least, again and again, until the
    layers together keep the amount; `data` decides which channels of a layer go first, and what reads
    them is refitted to do without. Every layer keeps at least `align` channels.

    Source: MultiPruner (Munoz et al. 2025, arXiv 2501.09949), stage 2, with `search: exact`, `reorder: l1` and
    `repair: false`; the rest as in `prune.multi`.
    Example: thin = prune.channels(keep: 75% of channels, align: 32)
    """

    acts_on = "channels"

    keep: Ratio = param(
        "Share of the channels, or of all parameters, that stays.", of=("channels", "params"), gt=0, le=1
    )
    on: Selector | None = param("Which MLPs.", default=None)
    align: int = param(
        "Widths are multiples of this, and it is the step of the search.", default=32, ge=1, unit="channels"
    )

    def make_search(self, skeleton: Skeleton) -> GreedySearch:
        chosen = reject_if_model_has_none(skeleton, "channels", groups(skeleton, "channels", self.on))
        return GreedySearch(
            Amount(self.keep),
            "channels",
            total_step_count(chosen),
            (WidthParts("channels", groups=chosen, step=self.align),),
            self.score,
            exact=self.search == "exact",
            rank="loss",
            align=self.align,
            even_params=True,
            fit=self.fit_settings,
        )

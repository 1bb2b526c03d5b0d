"""Make MLPs narrower."""

from typing import Literal

from ...compiler.planning.amount import Amount
from ...compiler.planning.select import groups, required
from ...compiler.search.fit import Fit
from ...compiler.search.greedy import Cutter, Greedy, items
from ...compiler.search.parts import WidthParts
from ...compiler.words.kinds import Lossy, Pass, param
from ...dsl.skeleton import Skeleton
from ...dsl.values import DataRef, MetricRef, Ratio, Selector


class Channels(Cutter, Pass):
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

    keeps = Lossy()
    acts_on = "channels"
    makes = {"score": "uneven widths"}
    determinism = "deterministic"

    keep: Ratio = param(
        "Share of the channels, or of all parameters, that stays.", of=("channels", "params"), gt=0, le=1
    )
    on: Selector | None = param("Which MLPs.", default=None)
    align: int = param(
        "Widths are multiples of this, and it is the step of the search.", default=32, ge=1, unit="channels"
    )
    score: MetricRef | None = param("What decides which layers lose more; without it all lose alike.", default=None)
    search: Literal["racing", "exact"] = param("With a score: try what may be best, or everything.", default="racing")
    reorder: Literal["l1", "wanda", "obs"] | None = param(
        "Which items of a module go first: by weights, by weights and inputs, or by the error left after repair; "
        "obs with a score, else l1.",
        default=None,
    )
    repair: bool = param("With a score, refit what reads the items that go.", default=True)
    data: DataRef | None = param(
        "Rows that items are ranked and readers refitted on, several thousand tokens, not the score's; unless given, "
        "32 that the model itself writes.",
        default=None,
    )

    def greedy(self, skeleton: Skeleton) -> Greedy:
        chosen = required(skeleton, "channels", groups(skeleton, "channels", self.on))
        return Greedy(
            Amount(self.keep),
            "channels",
            items(chosen),
            (WidthParts("channels", groups=chosen, step=self.align),),
            self.score,
            exact=self.search == "exact",
            rank="loss",
            align=self.align,
            even_params=True,
            fit=Fit(self.reorder or "obs", self.repair, self.data),
        )

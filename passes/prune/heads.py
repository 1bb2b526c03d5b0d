"""Remove attention heads."""

from typing import Literal

from ...compiler.planning.amount import Amount
from ...compiler.planning.select import groups, required
from ...compiler.search.fit import Fit
from ...compiler.search.greedy import Cutter, Greedy, items
from ...compiler.search.parts import WidthParts
from ...compiler.words.kinds import Lossy, Pass, param
from ...dsl.skeleton import Group, Skeleton
from ...dsl.values import DataRef, MetricRef, Ratio, Selector


class Heads(Cutter, Pass):
    """Remove attention heads.

    `of heads` removes query heads: under grouped-query attention the same number from every KV head. `of
    kv_heads` removes KV heads with all the query heads that they serve, and so shrinks the cache as well. Without
    a score every layer keeps the same share and loses the heads of least weight magnitude; with one the layers
    compete, one step at a time, `data` decides which heads of a layer go first, and what reads them is
    refitted to do without. One head, or one per KV head, always stays.

    Source: MultiPruner (Munoz et al. 2025, arXiv 2501.09949), stage 3, with `search: exact`, `reorder: l1` and
    `repair: false`; query heads inside groups: own; the rest as in `prune.multi`.
    Example: bald = prune.heads(keep: 50% of kv_heads)
    """

    keeps = Lossy()
    acts_on = "heads"
    makes = {"score": "uneven heads"}
    determinism = "deterministic"

    keep: Ratio = param("Share of the query heads or KV heads that stays.", of=("heads", "kv_heads"), gt=0, le=1)
    on: Selector | None = param("Which attention modules.", default=None)
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
        chosen = self._groups(skeleton)
        kind = chosen[0].kind if chosen else "heads"
        return Greedy(
            Amount(self.keep),
            kind,
            items(chosen),
            (WidthParts(kind, groups=chosen),),
            self.score,
            exact=self.search == "exact",
            rank="loss",
            fit=Fit(self.reorder or "obs", self.repair, self.data),
        )

    def _groups(self, skeleton: Skeleton) -> tuple[Group, ...]:
        """Groups of the kind that `keep` counts; where every query head has its own KV head, both are one."""
        kind = "kv_heads" if self.keep.of == "kv_heads" else "heads"
        found = groups(skeleton, kind, self.on)
        return required(skeleton, kind, found or groups(skeleton, "heads", self.on))

"""Remove attention heads."""

from ...compiler.analysis.planning.amount import Amount
from ...compiler.analysis.planning.selection import groups, reject_if_model_has_none
from ...compiler.plugin.interfaces import param
from ...compiler.transforms.search.greedy import GreedySearch, total_step_count
from ...compiler.transforms.search.parts import WidthParts
from ...compiler.transforms.search.width_pruner import RefittingPruner
from ...dsl.checker.skeleton import Group, Skeleton
from ...dsl.checker.values import Ratio, Selector


class Heads(RefittingPruner):
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

    acts_on = "heads"
    uneven = "uneven heads"

    keep: Ratio = param("Share of the query heads or KV heads that stays.", of=("heads", "kv_heads"), gt=0, le=1)
    on: Selector | None = param("Which attention modules.", default=None)

    def make_search(self, skeleton: Skeleton) -> GreedySearch:
        chosen = self._head_groups_or_reject(skeleton)
        kind = chosen[0].kind if chosen else "heads"
        return GreedySearch(
            Amount(self.keep),
            kind,
            total_step_count(chosen),
            (WidthParts(kind, groups=chosen),),
            self.score,
            exact=self.search == "exact",
            rank="loss",
            fit=self.fit_settings,
        )

    def _head_groups_or_reject(self, skeleton: Skeleton) -> tuple[Group, ...]:
        """Groups of the kind that `keep` counts; where every query head has its own KV head, both are one."""
        kind = "kv_heads" if self.keep.of == "kv_heads" else "heads"
        of_kind = groups(skeleton, kind, self.on)
        return reject_if_model_has_none(skeleton, kind, of_kind or groups(skeleton, "heads", self.on))

"""Remove attention heads."""

from typing import Literal

from ...compiler.ir.program import Program
from ...compiler.planning.amount import Amount
from ...compiler.planning.select import groups, required
from ...compiler.search.effort import of_fitting
from ...compiler.search.goals import budget, reach, refuse_unreached
from ...compiler.search.loop import Search
from ...compiler.search.narrowing import forecast, forwards, narrow_evenly
from ...compiler.search.ordering import choice_of, ordering
from ...compiler.search.saving import Ledger, steps
from ...compiler.search.widths import Widths
from ...compiler.words.context import Context
from ...compiler.words.kinds import Effort, Lossy, Pass, param
from ...dsl.skeleton import Group, Skeleton
from ...dsl.values import DataRef, MetricRef, Ratio, Selector


class Heads(Pass):
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
        "obs with a score, else l1.", default=None)
    repair: bool = param("With a score, refit what reads the items that go.", default=True)
    data: DataRef | None = param(
        "Rows that items are ranked and readers refitted on, several thousand tokens, not the score's; unless given, "
        "32 that the model itself writes.", default=None)

    def run(self, program: Program, ctx: Context) -> None:
        skeleton = program.skeleton
        chosen = self._groups(skeleton)
        if self.score is None:
            narrow_evenly(program, chosen, Amount(self.keep), align=1)
            return
        ledger, size = Ledger(skeleton), sum(steps(g) for g in chosen)
        goal = budget(skeleton, Amount(self.keep), chosen[0].kind if chosen else "heads", size)
        refuse_unreached(reach(ledger, goal.of, (), [(g, 1) for g in chosen]), goal)
        search = Search(program, ctx)
        important, fixed = ordering(program, ctx, search, chosen, self.score, self.reorder or "obs", self.repair,
                                    self.data)
        pool = Widths(program, chosen, 1, ledger, important, fixed)
        search.run([pool], self.score, goal, choice_of(self.search, ""))
        search.finish([pool])

    def _groups(self, skeleton: Skeleton) -> tuple[Group, ...]:
        """Groups of the kind that `keep` counts; where every query head has its own KV head, both are one."""
        kind = "kv_heads" if self.keep.of == "kv_heads" else "heads"
        found = groups(skeleton, kind, self.on)
        return required(skeleton, kind, found or groups(skeleton, "heads", self.on))

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        return forecast(skeleton, self._groups(skeleton), Amount(self.keep), 1)

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        if self.score is None or (self.reorder == "l1" and not self.repair):
            return Effort()
        return of_fitting(skeleton, ctx, self._groups(skeleton), self.data)

    def forwards(self, skeleton: Skeleton) -> int:
        if self.score is None:
            return 0
        return forwards(skeleton, self._groups(skeleton), Amount(self.keep), 1)

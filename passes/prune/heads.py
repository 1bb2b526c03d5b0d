"""Remove attention heads."""

from ...compiler.amount import Amount
from ...compiler.context import Context
from ...compiler.importance import l1
from ...compiler.kinds import Lossy, Pass, param
from ...compiler.narrowing import forecast, forwards, narrow_evenly
from ...compiler.program import Program
from ...compiler.search.choice import Exact
from ...compiler.search.goals import budget, refuse_unreachable
from ...compiler.search.loop import Search
from ...compiler.search.saving import Ledger
from ...compiler.search.widths import Widths
from ...compiler.select import groups
from ...dsl.skeleton import Group, Skeleton
from ...dsl.values import MetricRef, Ratio, Selector


class Heads(Pass):
    """Remove attention heads.

    `of heads` removes query heads: under grouped-query attention the same number from every KV head. `of
    kv_heads` removes KV heads with all the query heads that they serve, and so shrinks the cache as well. Without
    a score every layer keeps the same share; with one the layers compete, one step at a time. Inside a layer the
    heads of least weight magnitude go first; one head, or one per KV head, always stays.

    Source: MultiPruner (Munoz et al. 2025, arXiv 2501.09949), stage 3; query heads inside groups: own.
    Example: bald = prune.heads(keep: 50% of kv_heads)
    """

    keeps = Lossy()
    acts_on = "heads"
    makes = {"score": "uneven heads"}
    determinism = "deterministic"

    keep: Ratio = param("Share of the query heads or KV heads that stays.", of=("heads", "kv_heads"), gt=0, le=1)
    on: Selector | None = param("Which attention modules.", default=None)
    score: MetricRef | None = param("What decides which layers lose more; without it all lose alike.", default=None)

    def run(self, program: Program, ctx: Context) -> None:
        skeleton = program.skeleton
        chosen = self._groups(skeleton)
        if self.score is None:
            narrow_evenly(program, chosen, Amount(self.keep), align=1)
            return
        pool = Widths(program, chosen, 1, Ledger(skeleton), lambda g: l1(program, g))
        goal = budget(skeleton, Amount(self.keep), pool.kind, sum(s.size for s in pool.sites))
        refuse_unreachable([pool], goal)
        search = Search(program, ctx)
        search.run([pool], self.score, goal, Exact())
        search.finish([pool])

    def _groups(self, skeleton: Skeleton) -> tuple[Group, ...]:
        """Groups of the kind that `keep` counts; where every query head has its own KV head, both are one."""
        kind = "kv_heads" if self.keep.of == "kv_heads" else "heads"
        found = groups(skeleton, kind, self.on)
        return found or groups(skeleton, "heads", self.on)

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        return forecast(skeleton, self._groups(skeleton), Amount(self.keep), 1)

    def forwards(self, skeleton: Skeleton) -> int:
        if self.score is None:
            return 0
        return forwards(skeleton, self._groups(skeleton), Amount(self.keep), 1)

"""Remove attention heads."""

from ...compiler.amount import Amount
from ...compiler.context import Context
from ...compiler.kinds import Lossy, Pass, param
from ...compiler.narrowing import forecast, forwards, narrow_evenly, narrow_greedily
from ...compiler.program import Program
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
        chosen = self._groups(program.skeleton)
        if self.score is None:
            narrow_evenly(program, chosen, Amount(self.keep), align=1)
            return
        for cut in narrow_greedily(program, chosen, Amount(self.keep), 1, ctx.metric(self.score), ctx):
            program.note(cut=cut.label, score=cut.score, runner_up=cut.runner_up, by=self.score.name)

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

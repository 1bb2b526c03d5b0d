"""Make MLPs narrower."""

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


class Channels(Pass):
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

    keep: Ratio = param("Share of the channels, or of all parameters, that stays.", of=("channels", "params"),
                        gt=0, le=1)
    on: Selector | None = param("Which MLPs.", default=None)
    align: int = param("Widths are multiples of this, and it is the step of the search.", default=32, ge=1,
                       unit="channels")
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
            narrow_evenly(program, chosen, Amount(self.keep), self.align)
            return
        ledger, size = Ledger(skeleton), sum(steps(g) for g in chosen)
        goal = budget(skeleton, Amount(self.keep), "channels", size)
        refuse_unreached(reach(ledger, goal.of, (), [(g, self.align) for g in chosen]), goal)
        search = Search(program, ctx)
        important, fixed = ordering(program, ctx, search, chosen, self.score, self.reorder or "obs", self.repair,
                                    self.data)
        pool = Widths(program, chosen, self.align, ledger, important, fixed)
        search.run([pool], self.score, goal, choice_of(self.search, ""))
        search.finish([pool])

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        return forecast(skeleton, self._groups(skeleton), Amount(self.keep), self.align)

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        if self.score is None or (self.reorder == "l1" and not self.repair):
            return Effort()
        return of_fitting(skeleton, ctx, groups(skeleton, "channels", self.on), self.data)

    def forwards(self, skeleton: Skeleton) -> int:
        if self.score is None:
            return 0
        return forwards(skeleton, self._groups(skeleton), Amount(self.keep), self.align)

    def _groups(self, skeleton: Skeleton) -> tuple[Group, ...]:
        return required(skeleton, "channels", groups(skeleton, "channels", self.on))

"""Remove whole residual branches or layers, the least missed first."""

from typing import Literal

from ...compiler.ir.program import Program
from ...compiler.planning import shrink
from ...compiler.planning.amount import Amount
from ...compiler.planning.select import branches, layers
from ...compiler.search.branches import Branches, Layers
from ...compiler.search.goals import budget, refuse_unreached
from ...compiler.search.loop import Budget, Search
from ...compiler.search.ordering import choice_of
from ...compiler.search.saving import Ledger
from ...compiler.words.context import Context
from ...compiler.words.kinds import Lossy, Pass, param
from ...dsl.diagnostics import Fault, Reject
from ...dsl.skeleton import Skeleton
from ...dsl.values import MetricRef, Ratio, Selector

no_block = Fault("no-block", "Blocks are to go from a model that has none to spare.")


class Blocks(Pass):
    """Remove whole residual branches or layers, the least missed first.

    A branch is what one attention or MLP adds to the residual stream. Candidates are scored by running the model
    without them; the one that is missed least goes, and so on. An exact search scores all of them again after
    each cut, attention first; a racing one only those that may win by what they cost before. Of `params`, either
    weighs what a block costs against its size. Removing layers leaves a stock checkpoint; removing branches leaves
    shapes that only `effc.load` reads at their true size. The last branch and the last layer always stay.

    Source: BlockPruner (Zhong et al. 2024, arXiv 2406.10594), section 3; stage 1 of MultiPruner.
    Example: slim = prune.blocks(remove: 2, score: perplexity(calib))
    """

    keeps = Lossy()
    acts_on = "branches"
    makes = {"unit: branch": "missing branches"}
    determinism = "deterministic"

    remove: int | Ratio = param("How many to remove, or what share of them or of all parameters.",
                                of=("blocks", "params"), ge=1, unit="blocks")
    score: MetricRef = param("What the model is scored by without each candidate.")
    on: Selector | None = param("Which may go: paths of attention or MLP modules, or of layers.", default=None)
    unit: Literal["branch", "layer"] = param("Remove single branches, or whole layers.", default="branch")
    search: Literal["racing", "exact"] = param("Score the blocks that may be best, or all.", default="racing")

    def run(self, program: Program, ctx: Context) -> None:
        skeleton, goal = program.skeleton, self._goal(program.skeleton)
        self._refuse_without_choice(skeleton)
        if self.unit == "layer":
            pool = Layers(program, layers(skeleton, self.on), Ledger(skeleton))
        else:
            pool = Branches(program, branches(skeleton, self.on), Ledger(skeleton))
        refuse_unreached(pool.reachable(goal.of), goal)
        search = Search(program, ctx)
        search.run([pool], self.score, goal, choice_of(self.search, "params" if goal.of == "params" else ""))
        refuse_unreached(search.saved.get(goal.of, 0.0), goal)      # a layer may be needed once others are gone
        search.finish([pool])

    def _goal(self, skeleton: Skeleton) -> Budget:
        count = len(skeleton.units if self.unit == "layer" else skeleton.branches)
        return budget(skeleton, Amount(self.remove, removes=True), "blocks", count)

    def _refuse_without_choice(self, skeleton: Skeleton) -> None:
        """The last one stays, so that one alone is none to remove."""
        found, what = (skeleton.units, "layer") if self.unit == "layer" else (skeleton.branches, "residual branch")
        if len(found) <= 1:
            raise Reject(no_block(f"{skeleton.model_type} has {'one' if found else 'no'} {what} that effc can tell"
                                  f"{', and the last one stays' if found else ''}",
                                  help="`prune.channels` makes what is there narrower"))

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        """Which ones go is not known: the smallest, so that the plan promises no more than what comes."""
        return self._likely(skeleton)[0]

    def forwards(self, skeleton: Skeleton) -> int:
        return self._likely(skeleton)[1]

    def _likely(self, skeleton: Skeleton) -> tuple[Skeleton, int]:
        """The skeleton after the smallest candidates went, and how many are scored on the way."""
        self._refuse_without_choice(skeleton)
        goal, ledger, saved, scored = self._goal(skeleton), Ledger(skeleton), 0.0, 0
        if self.unit == "layer":
            weigh, names = ledger.layer, list(layers(skeleton, self.on))
        else:
            weigh, names = ledger.branch, [b.site for b in branches(skeleton, self.on)]
        order, gone = sorted(names, key=lambda name: weigh(name, "params")), []
        while not goal.is_met(saved) and len(gone) < len(order):
            name = order[len(gone)]
            saved, scored = saved + weigh(name, goal.of), scored + len(order) - len(gone)
            gone.append(name)
        for name in sorted(gone, key=names.index, reverse=True):       # layers behind a dropped one move up
            skeleton = _without(skeleton, name)
        return skeleton, scored


def _without(skeleton: Skeleton, name: str) -> Skeleton:
    branch = next((b for b in skeleton.branches if b.site == name), None)
    return shrink.without_branch(skeleton, branch) if branch else shrink.without_unit(skeleton, name)

"""Remove whole state-space blocks, the least missed first."""

from typing import Literal

from ...compiler.ir.program import Program
from ...compiler.planning import shrink
from ...compiler.planning.amount import Amount
from ...compiler.planning.select import mixers
from ...compiler.search.branches import Branches, Layers
from ...compiler.search.candidate import Pool
from ...compiler.search.goals import budget, refuse_unreached
from ...compiler.search.loop import Budget
from ...compiler.search.saving import Ledger
from ...compiler.search.single import cut_until_met, foreseen
from ...compiler.words.context import Context
from ...compiler.words.kinds import Lossy, Pass, param
from ...dsl.skeleton import Branch, Skeleton
from ...dsl.values import MetricRef, Ratio, Selector


class Blocks(Pass):
    """Remove whole state-space blocks, the least missed first.

    A block is what one mixer adds to the residual stream, with its norm. Candidates are scored by running the model
    without them; the one that is missed least goes, and so on. Where a layer is nothing but such a block (Mamba,
    Mamba-2, FalconMamba, NemotronH) and the config can do without it, the layer goes as a whole, which leaves a stock
    checkpoint with its cache slots; in hybrids the layer keeps its MLP, and the cache slot goes to another layer. The
    last block of the model always stays. `prune.blocks` does the same for blocks of all kinds.

    Source: Mamba-Shedder (Munoz et al. 2025, arXiv 2501.17088), section 3, with `search: exact`; ratios and racing:
    own.
    Example: slim = shed.blocks(remove: 2, score: perplexity(calib))
    """

    keeps = Lossy()
    acts_on = "ssm"
    makes = {"": "missing blocks"}
    determinism = "deterministic"

    remove: int | Ratio = param("How many blocks to remove, or what share of them or of the whole model.",
                                of=("blocks", "params", "flops", "bytes"), ge=1, unit="blocks")
    score: MetricRef = param("What the model is scored by without each candidate.")
    on: Selector | None = param("Which mixers may go.", default=None)
    search: Literal["racing", "exact"] = param("Score the blocks that may be missed least, or all.", default="racing")

    def run(self, program: Program, ctx: Context) -> None:
        skeleton, goal = program.skeleton, self._goal(program.skeleton)
        pool = _pool(program, mixers(skeleton, self.on), Ledger(skeleton))
        most = min(pool.reachable(goal.of), self._most(skeleton, goal.of))
        cut_until_met(program, ctx, pool, self.score, goal, self.search, most)

    def _goal(self, skeleton: Skeleton) -> Budget:
        return budget(skeleton, Amount(self.remove, removes=True), "blocks", len(mixers(skeleton, None)))

    def _most(self, skeleton: Skeleton, of: str) -> float:
        """All that may go, but of all mixers of the model the smallest."""
        ledger, chosen = Ledger(skeleton), mixers(skeleton, self.on)
        each = sorted(ledger.branch(b.site, of) for b in chosen)
        return sum(each[1:] if len(each) == len(mixers(skeleton, None)) else each)

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        """Which ones go is not known: the smallest, so that the plan promises no more than what comes."""
        return self._likely(skeleton)[0]

    def forwards(self, skeleton: Skeleton) -> int:
        return self._likely(skeleton)[1]

    def _likely(self, skeleton: Skeleton) -> tuple[Skeleton, int]:
        ledger, goal = Ledger(skeleton), self._goal(skeleton)
        refuse_unreached(self._most(skeleton, goal.of), goal)
        sites = [b.site for b in sorted(mixers(skeleton, self.on), key=lambda b: ledger.branch(b.site, "params"))]
        return foreseen(skeleton, goal, sites, lambda now, site: shrink.without_branch(
            now, next(b for b in now.branches if b.site == site)))


def _pool(program: Program, chosen: tuple[Branch, ...], ledger: Ledger) -> Pool:
    """Layers where each chosen block is one and the model runs without any of them; else branches."""
    alone = {u for u in program.units if sum(b.unit == u for b in program.skeleton.branches) == 1}
    units = [b.unit for b in chosen]
    if alone.issuperset(units):
        layers = Layers(program, units, ledger)
        if layers.independent:
            return layers
    return Branches(program, chosen, ledger)

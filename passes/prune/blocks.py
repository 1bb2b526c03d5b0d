"""Remove whole residual branches or layers, the least missed first."""

from dataclasses import InitVar, dataclass
from typing import Literal

from ...compiler import shrink
from ...compiler.amount import Amount
from ...compiler.bypass import staying
from ...compiler.context import Context
from ...compiler.greedy import Greedy
from ...compiler.kinds import Lossy, Pass, param
from ...compiler.program import Program
from ...compiler.rewrite import Rewriter
from ...compiler.select import branches, layers
from ...compiler.trial import without_branch, without_layer
from ...dsl.skeleton import Branch, Skeleton
from ...dsl.values import MetricRef, Ratio, Selector


class Blocks(Pass):
    """Remove whole residual branches or layers, the least missed first.

    A branch is what one attention or MLP adds to the residual stream. Every candidate is scored by running the
    model without it; the one whose loss hurts least goes, and the rest are scored again. Ties go to the earlier
    one. Removing layers leaves a stock checkpoint; removing branches leaves shapes that only `effc.load`
    reads at their true size. The last branch and the last layer always stay.

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

    def run(self, program: Program, ctx: Context) -> None:
        metric, goal = ctx.metric(self.score), self._goal(program.skeleton)
        pool = _Pool(program, self._candidates(program.skeleton))
        search = Greedy(
            metric=metric,
            candidates=lambda: pool.alive() if self._count(program.skeleton) > 1 else [],
            label=pool.name,
            score=lambda block: self._score(program, block, metric, ctx),
            cut=pool.cut,
            enough=lambda: goal(program.skeleton),
        )
        for cut in search.run(ctx):
            program.note(cut=cut.label, score=cut.score, runner_up=cut.runner_up, by=self.score.name)

    def _goal(self, start: Skeleton):
        """Whether a skeleton has lost enough of what `start` had."""
        if isinstance(self.remove, Ratio) and self.remove.of == "params":
            limit = (1 - self.remove.value) * shrink.params(start)
            return lambda now: shrink.params(now) <= limit
        count = self._count(start)
        keep = Amount(self.remove, removes=True).kept(count)
        return lambda now: self._count(now) <= keep

    def _count(self, skeleton: Skeleton) -> int:
        return len(skeleton.units if self.unit == "layer" else skeleton.branches)

    def _candidates(self, skeleton: Skeleton) -> list[Branch | str]:
        return list(layers(skeleton, self.on) if self.unit == "layer" else branches(skeleton, self.on))

    def _score(self, program: Program, block: Branch | str, metric, ctx: Context) -> float:
        trial = without_layer(program, block) if isinstance(block, str) else without_branch(program, block)
        with trial:
            return metric.measure(program.model, ctx)

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        """Which ones go is not known: the smallest, so that the plan promises no more than what comes."""
        return self._likely(skeleton)[0]

    def forwards(self, skeleton: Skeleton) -> int:
        return self._likely(skeleton)[1]

    def _likely(self, skeleton: Skeleton) -> tuple[Skeleton, int]:
        """The skeleton after the smallest candidates went, and how many were scored on the way."""
        goal, scored = self._goal(skeleton), 0
        left = len(self._candidates(skeleton))
        while not goal(skeleton) and left and self._count(skeleton) > 1:
            skeleton = max((_without(skeleton, b) for b in self._candidates(skeleton)), key=shrink.params)
            scored, left = scored + left, left - 1
        return skeleton, scored


@dataclass
class _Pool:
    """What may still go, under the names that things had when the search began: layers move up when one goes."""

    program: Program
    chosen: InitVar[list[Branch | str]]

    def __post_init__(self, chosen: list[Branch | str]):
        self.units = list(self.program.skeleton.units)
        self.allowed = {self.name(block) for block in chosen}

    def name(self, block: Branch | str) -> str:
        if isinstance(block, Branch):
            return block.site
        return self.units[self.program.skeleton.units.index(block)]

    def alive(self) -> list[Branch | str]:
        skeleton = self.program.skeleton
        return [b for b in (*skeleton.branches, *skeleton.units) if self.name(b) in self.allowed]

    def cut(self, block: Branch | str) -> None:
        self.allowed.remove(name := self.name(block))
        with Rewriter(self.program) as rewrite:
            if isinstance(block, Branch):
                graph = self.program.units[block.unit].graph
                rewrite.drop_branch(block.unit, block.join, keep=staying(graph, block))
            else:
                rewrite.drop_layer(block)
                self.units.remove(name)


def _without(skeleton: Skeleton, block: Branch | str) -> Skeleton:
    return shrink.without_unit(skeleton, block) if isinstance(block, str) else shrink.without_branch(skeleton, block)

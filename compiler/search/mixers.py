"""Fewer heads, channels or states of state-space mixers: the same share in each, or where a score suffers least."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...dsl.amounts import needs_score
from ...dsl.diagnostics import Reject
from ...dsl.skeleton import Group, Skeleton
from ...dsl.values import DataRef, MetricRef, Ratio
from ..editing.rewrite import Rewriter
from ..ir.surgery import tensor_at
from ..machine.memory import room_for
from ..planning.amount import Amount
from ..planning.shrink import narrowed
from . import importance
from .candidate import Pool
from .choice import Exact, Racing
from .estimate import thinned
from .goals import refuse_unreached
from .importance import ascending
from .loop import Budget, Search
from .narrowing import again
from .reconstruct import Moments, Reconstruction, module_of, readers
from .saving import OF_MODEL, Ledger, steps, whole
from .slices import Slices
from .widths import Site, Widths, slice_out

if TYPE_CHECKING:
    from ..ir.program import Program
    from ..words.context import Context

Important = Callable[[Group], torch.Tensor]


@dataclass(frozen=True)
class Shed:
    """What a pass asks: `keep` of the items, or of the model, of the groups chosen, `step` of each block a cut."""

    kind: str
    keep: Ratio
    groups: Sequence[Group]
    step: int
    score: MetricRef | None
    search: str
    repair: bool = False
    data: DataRef | None = None

    def run(self, program: "Program", ctx: "Context") -> None:
        if self.score is None:
            self._evenly(program)
            return
        ledger, goal = Ledger(program.skeleton), self.goal(program.skeleton)
        refuse_unreached(self.reach(ledger, goal.of), goal)
        search = Search(program, ctx)
        pool = self._pool(program, ctx, search, ledger)
        per = goal.of if goal.of in OF_MODEL else ""
        search.run([pool], self.score, goal, Exact(per) if self.search == "exact" else Racing(per))
        refuse_unreached(search.saved.get(goal.of, 0.0), goal)
        search.finish([pool])

    def goal(self, skeleton: Skeleton) -> Budget:
        if self.keep.of in OF_MODEL:
            self._score_needed()
            size = whole(skeleton, self.keep.of)
            return Budget(self.keep.of, size * (1 - self.keep.value), size)
        size = sum(g.count for g in self.groups)
        return Budget(self.kind, size - Amount(self.keep).kept(size), size)

    def reach(self, ledger: Ledger, of: str) -> float:
        """The most that can go: every block of every group keeps a step."""
        if of == self.kind:
            return sum((steps(g) - 1) // self.step * self.step * (g.count // steps(g)) for g in self.groups)
        return sum((steps(g) - 1) // self.step * self.step * ledger.of_step(g.site, g.kind, of) for g in self.groups)

    def _pool(self, program: "Program", ctx: "Context", search: Search, ledger: Ledger) -> Pool:
        important, moments = ranking(program, ctx, search, self.groups, self.score, self.data)
        if self.kind == "ssm_channels" and self.repair:
            return Widths(program, self.groups, self.step, ledger, important, Reconstruction(program, moments))
        return Slices(program, self.groups, self.step, ledger, important, self.kind)

    def _evenly(self, program: "Program") -> None:
        """Every group keeps the same share; the items of least weight magnitude go."""
        self._score_needed()
        with Rewriter(program) as rewrite:
            for group in self.groups:
                site = Site(group, ascending(magnitudes(program, group)))
                gone = site.next(site.size - self._kept(group))
                if gone:
                    slice_out(program, rewrite, group, set(gone))

    def _kept(self, group: Group) -> int:
        return Amount(self.keep).kept(steps(group), self.step)

    def _score_needed(self) -> None:
        if self.score is None and self.keep.of in OF_MODEL:
            raise Reject(needs_score(
                f"what is kept is a share of {self.keep.of}, and nothing says which layers lose more",
                help="add `score: perplexity(...)`, or keep a share of the items"))

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        if self.score is not None:
            goal = self.goal(skeleton)
            if goal.of in OF_MODEL:
                return thinned(skeleton, goal, self.groups, self.step, ())
        for group in self.groups:
            kept = self._kept(group) * group.count // steps(group)
            if kept < group.count:
                skeleton = narrowed(skeleton, again(skeleton, group), kept)
        return skeleton

    def forwards(self, skeleton: Skeleton) -> int:
        """Scores: all groups for every cut when exact, about six when racing."""
        if self.score is None or not self.groups:
            return 0
        goal, ledger = self.goal(skeleton), Ledger(skeleton)
        reach = self.reach(ledger, goal.of)
        cuts = sum((steps(g) - 1) // self.step for g in self.groups) * goal.goal / reach if reach else 0
        each = len(self.groups) if self.search == "exact" else min(6, len(self.groups))
        return round(cuts * each)


def ranking(program: "Program", ctx: "Context", search: Search, groups: Sequence[Group], score: MetricRef,
            data: DataRef | None) -> tuple[Important, Moments]:
    """By the error that readers are left with after repair; items that only the scan reads, by weight magnitude."""
    moments = Moments(ctx.workdir / "moments")
    modules = [module_of(m) for g in groups if g.readers for m in readers(g)]
    if modules:
        search.collect(moments, modules, score, data, room_for(ctx.settings.max_memory))

    def important(group: Group) -> torch.Tensor:
        return importance.obs(program, group, moments) if group.readers else magnitudes(program, group)
    return important, moments


def magnitudes(program: "Program", group: Group) -> torch.Tensor:
    """Sum of magnitudes of the weights that make an item; [count] float64."""
    total = torch.zeros(group.count, dtype=torch.float64)
    for member in group.members[: len(group.members) - group.readers]:
        tensor = tensor_at(program.model, member.tensor)
        if not isinstance(tensor, nn.Parameter):           # what only follows says nothing of an item's weight
            continue
        tensor = tensor.detach().abs().double().cpu()
        sums = tensor.transpose(0, member.axis).reshape(tensor.shape[member.axis], -1).sum(1)
        total += torch.stack([sums[member.indices(item)].sum() for item in range(group.count)])
    return total

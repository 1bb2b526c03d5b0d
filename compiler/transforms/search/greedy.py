"""A greedy search as a pass asks for it: kinds of parts, an amount, a score; and what `plan` says of it.

Everything that cuts part by part is one of these: `prune.*`, `shed.*`. Without a score nothing is searched: groups are
narrowed alike.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ....dsl.checker.amounts import needs_score
from ....dsl.checker.skeleton import Group, Skeleton
from ....dsl.checker.values import MetricRef, Ratio, Shares
from ....dsl.syntax.diagnostics import Fault
from ...analysis.discovery.discover import skeleton_of
from ...analysis.planning.amount import Amount
from ...analysis.planning.cost import token_or_image_count
from ...analysis.planning.shrink import param_count
from ...core.deadline import DeadlineExceeded
from ...plugin.interfaces import Effort
from .budget import CUTS, Budget
from .choice import CutStrategy, Exact, Racing
from .compensation import FitSettings, GroupRanking
from .effort import estimate_fitting_effort
from .estimate import shrink_to_budget
from .goals import (
    kinds_with_cumulative_shares,
    make_budget,
    max_savings,
    min_savings_of_one_cut,
    refuse_overshoot,
    refuse_oversized_step,
    refuse_unreachable,
)
from .gradients import SWEEP
from .latency import Latency, measure_and_note_latency
from .loop import Search
from .overfit import OverfitCheck, refuse_too_few_rows
from .parts import Parts, RemovableParts
from .reach import refuse_gap
from .savings import OF_MODEL, SavingsTable, step_count_of, steps_per_cut
from .score_estimates import ScoreEstimates
from .uniform_widths import (
    forecast_even_widths,
    narrow_evenly_and_report,
    note_and_report_refusals,
    split_cuttable_and_uncuttable,
)

if TYPE_CHECKING:
    from ...ir.program import Program
    from ...plugin.context import Context

invalid_turns = Fault("bad-turns", "The kinds that a search may cut, and what they are given, don't go together.")


@dataclass(frozen=True)
class GreedySearch:
    """Request of a search on one model.

    amount   what goes or stays: a share, or a number of items or of cuts
    budget_kind  what a share that isn't of the model, or a number, counts: "blocks", "heads", "cuts"; `total` of them
    parts    the kinds of parts that may be cut, in the order that settles ties and in which they take turns
    score    what decides; None narrows every group alike
    rank     by loss per unit of what is saved, where that is the model's, or by plain loss
    order    of the kinds' turns, also of those that the model lacks, where `split` gives each its share
    fit      which items of a group go first, and whether what reads them is refitted
    norms    whether norms count with their branch; the published loop leaves them out
    widths   the score of kinds other than blocks, where it is another
    check    a metric beside the score
    estimate "taylor": a racing search scores what an estimate from gradients does not show to lose
    together how many cuts of different layers a racing search may make after one round
    align    what widths are multiples of, where groups are narrowed alike; `even_params` whether that can meet params
    """

    amount: Amount
    budget_kind: str
    total: float
    parts: tuple[Parts, ...]
    score: MetricRef | None
    exact: bool
    rank: str = "ratio"
    fit: FitSettings = field(default_factory=FitSettings)
    align: int = 1
    order: tuple[str, ...] = ()
    split: Shares | None = None
    norms: bool = True
    widths: MetricRef | None = None
    check: MetricRef | None = None
    clock: MetricRef | None = None
    even_params: bool = False
    estimate: str = "none"
    together: int = 1
    overshoots: bool = True  # whether far more may go than is asked for, where nothing smaller can

    # -- the search ------------------------------------------------------------------------------------------

    def run(self, program: "Program", ctx: "Context") -> None:
        if self.score is None:
            self._refuse_budget_that_needs_score()
            narrow_evenly_and_report(program, self.groups, self.amount, self.align, ctx.emit_event, ctx.map_from_cache)
            return
        ordered, search = self.kinds_with_cumulative_shares(), Search(program, ctx)
        latency = None
        if self.amount.of == "latency":
            assert self.clock is not None, "a latency that no clock measures"
            latency = measure_and_note_latency(program, search, self.clock)
        savings_table, goal = (
            SavingsTable(skeleton_of(program), self.norms, latency),
            self.budget_of_search(skeleton_of(program), latency),
        )
        self._refuse_unmeetable_goal(savings_table, goal)
        search.limit = None if self.overshoots or goal.of not in OF_MODEL else goal
        fitting = GroupRanking(program, ctx, search, self.widths or self.score, self.fit)
        try:
            able = self._select_cuttable_parts_and_collect_moments(program, search, fitting, goal)
        except DeadlineExceeded:
            raise search.too_short_rejection(sum(p.count for p in self.parts)) from None
        pools = {p.kind: p.make_candidate_pool(program, savings_table, fitting) for p in able}
        if len(pools) == 1:
            refuse_unreachable(next(iter(pools.values())).reachable(goal.of), goal, search.rejected)
        choice, search.overfit = self._cut_strategy(goal), OverfitCheck(self.check, goal.goal) if self.check else None
        for kinds, share in ordered:
            stage_budget = Budget(goal.of, share * goal.goal, goal.total)
            score = self.score if "blocks" in kinds or self.widths is None else self.widths
            search.cut_until_met([pools[kind] for kind in kinds if kind in pools], score, stage_budget, choice)
            if search.stopped:
                break
        if not search.stopped:
            refuse_unreachable(search.saved.get(goal.of, 0.0), goal, search.rejected)
            search.warn_if_overshot(goal)
        search.finish_cuts_and_record_cost(list(pools.values()))

    def _select_cuttable_parts_and_collect_moments(
        self, program: "Program", search: Search, fitting: GroupRanking, goal: Budget
    ) -> list[Parts]:
        """The parts without groups that can't be cut, each of which is said with the reason; moments that rank items of
        the others are collected."""
        able = []
        for parts in self.parts:
            groups, refusals = split_cuttable_and_uncuttable(
                program, [(g, steps_per_cut(g, parts.step)) for g in parts.groups]
            )
            note_and_report_refusals(program, refusals, search.ctx.emit_event)
            search.rejected |= {f"{group.site}:{group.kind}": reason for group, reason in refusals}
            able += [parts.restricted_to(groups)] if groups or not parts.groups else []
        if not able:
            refuse_unreachable(0.0, goal, search.rejected)
        fitting.collect_and_store_moments(able)
        return able

    def kinds_with_cumulative_shares(self) -> list[tuple[tuple[str, ...], float]]:
        """(kinds that compete, share of what is to go that must have gone when their turn ends)."""
        order = tuple(dict.fromkeys(self.order or [p.kind for p in self.parts]))
        if self.split is None:
            return [(order, 1.0)]
        if sum(self.split.share(kind) for kind in order) <= 0:
            raise invalid_turns(
                f"`split` gives {', '.join(order) or 'no kind of `order`'} nothing",
                help="name kinds in `order` that `split` gives a share",
                argument="order",
            ).rejection()
        return kinds_with_cumulative_shares(order, self.split)

    def _cut_strategy(self, goal: Budget) -> CutStrategy:
        per = goal.of if self.rank == "ratio" and (goal.of in OF_MODEL or goal.of == "latency") else ""
        if self.exact:
            return Exact(per)
        return Racing(per, ScoreEstimates() if self.estimate == "taylor" else None, self.together)

    # -- what is to go, and what can -------------------------------------------------------------------------

    @property
    def groups(self) -> list[Group]:
        return [g for parts in self.parts for g in parts.groups]

    def budget_of_search(self, skeleton: Skeleton, measured_latency: Latency | None = None) -> Budget:
        """The budget; one of a latency that is not measured yet as if time went with operations."""
        value = self.amount.value
        if self.budget_kind == CUTS and isinstance(value, int):
            return Budget(CUTS, value, value)
        if isinstance(value, Ratio) and value.of == "latency" and measured_latency is None:
            flops = Amount(Ratio(value.value, "flops"), self.amount.removes)
            return make_budget(skeleton, flops, self.budget_kind)
        return make_budget(
            skeleton, self.amount, self.budget_kind, measured_latency.total if measured_latency else self.total
        )

    def _refuse_unmeetable_goal(self, savings_table: SavingsTable, goal: Budget) -> None:
        for parts in self.parts:
            if parts.parameter:
                refuse_oversized_step(parts.parameter, parts.step, parts.groups)
        if goal.of in OF_MODEL and not self.overshoots:
            refuse_overshoot(min_savings_of_one_cut(savings_table, goal.of, self.parts), 0.0, goal)
        if goal.of != CUTS:
            refuse_unreachable(max_savings(savings_table, goal.of, self.parts), goal, savings_table.skeleton.stays)
        if goal.of in OF_MODEL and not self.overshoots:
            refuse_gap(savings_table, goal, self.parts)

    # -- what `plan` says ------------------------------------------------------------------------------------

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        """Forecast the skeleton after the search: as if groups went alike, and of whole parts the smallest, as many as
        the budget takes."""
        if self.score is None:
            self._refuse_budget_that_needs_score()
            return forecast_even_widths(skeleton, self.groups, self.amount, self.align)
        self.kinds_with_cumulative_shares()
        goal = self.budget_of_search(skeleton)
        if goal.of == CUTS:
            return skeleton
        if self.amount.of != "latency":
            self._refuse_unmeetable_goal(SavingsTable(skeleton, self.norms), goal)
        return shrink_to_budget(skeleton, goal, self.parts).skeleton

    def _refuse_budget_that_needs_score(self) -> None:
        if self.amount.of in ("flops", "bytes") or (self.amount.of == "params" and not self.even_params):
            raise needs_score(
                f"what is kept is a share of {self.amount.of}, and nothing says which layers lose more",
                help="add `score: perplexity(...)`, or keep a share of the items",
            ).rejection()

    def estimated_score_count(self, skeleton: Skeleton) -> int:
        """Number of scores it takes: every candidate for each cut where it is exact, about three where it races; with
        estimates a sweep, a third of the candidates, and three for every round."""
        if self.score is None:
            return 0
        goal, first = self.budget_of_search(skeleton), sum(p.count for p in self.parts)
        cuts = int(goal.goal) if goal.of == CUTS else shrink_to_budget(skeleton, goal, self.parts).n_cuts
        removable = sum(p.count for p in self.parts if isinstance(p, RemovableParts))
        removed = min(cuts, removable) if removable == first else 0
        fewer = removed * (removed - 1) // 2  # what is gone is asked no more
        all_scores = cuts * first - fewer
        begin, rounds = first, math.ceil(cuts / self.together)
        if self.estimate == "taylor":
            begin = min(first, SWEEP + first // max(1, len(skeleton.units)) + first // 3)
        return all_scores if self.exact else min(all_scores, begin + 3 * rounds)

    def estimate_effort_or_reject(self, skeleton: Skeleton, ctx: "Context") -> Effort:
        """Ranking and refitting, and the rows that the model writes for them. Raises Reject (too-few-rows)."""
        if self.score is not None and not self.exact and (goal := self.budget_of_search(skeleton)).of in OF_MODEL:
            refuse_too_few_rows(self.score, goal.goal / goal.total * param_count(skeleton), ctx)
        fitted = [] if self.score is None else self.fit.groups_with_observed_readers(self.parts)
        effort = estimate_fitting_effort(skeleton, ctx, fitted, self.fit.data) if fitted else Effort()
        routed, data = any(p.kind == "experts" and p.groups for p in self.parts), self.fit.data
        tokens = effort.tokens + (token_or_image_count(ctx.rows(data)) if data is not None and routed else 0)
        work = {"look": 4.0 * param_count(skeleton), **effort.work}
        return replace(effort, tokens=tokens, work=work, streams=self.score is None)


class GreedyPruner(ABC):
    """A pass that is a greedy search and nothing else: it says of which parts, the rest follows."""

    @abstractmethod
    def make_search(self, skeleton: Skeleton) -> GreedySearch:
        """The search on a model of this skeleton. Raises Reject where there is nothing to cut."""

    def run(self, program: "Program", ctx: "Context") -> None:
        self.make_search(skeleton_of(program)).run(program, ctx)

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        return self.make_search(skeleton).forecast(skeleton)

    def forwards(self, skeleton: Skeleton) -> int:
        return self.make_search(skeleton).estimated_score_count(skeleton)

    def effort(self, skeleton: Skeleton, ctx: "Context") -> Effort:
        return self.make_search(skeleton).estimate_effort_or_reject(skeleton, ctx)


def total_step_count(groups: Sequence[Group]) -> int:
    """Total number of steps of some groups."""
    return sum(map(step_count_of, groups))

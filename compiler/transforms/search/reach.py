"""Whether what is left can meet a budget without going far beyond it: parts that go as a whole leave gaps."""

import math
from collections.abc import Sequence

from ...analysis.planning.amount import SPARE, overshoots
from .budget import Budget
from .candidate import Candidate, Pool
from .goals import refuse_overshoot, savings_of_step
from .parts import Parts, RemovableParts, WidthParts
from .refusals import percent_floor
from .savings import SavingsTable

_SUMS = 1000  # of sizes of parts; where there are more, they lie close together


def can_be_met(
    budget: Budget, already_saved: float, part_savings: Sequence[float], max_width_savings: float = 0.0
) -> bool:
    """Whether some of these parts meet a budget of which so much is saved, and leave no more than a cut may go beyond.

    part_savings   savings of each part that goes as a whole
    max_width_savings  savings of all that is cut in steps, which meet any budget up to that
    """
    return _gap_around_unmeetable_budget(budget, already_saved, part_savings, max_width_savings) is None


def _gap_around_unmeetable_budget(
    budget: Budget, already_saved: float, part_savings: Sequence[float], max_width_savings: float
) -> tuple[float, float] | None:
    """Savings below and beyond a budget that can't be met; None where it can be."""
    sums, beyond = {already_saved}, math.inf
    for part in sorted(part_savings, reverse=True):
        if len(sums) > _SUMS or any(budget.is_met(s + max_width_savings) for s in sums):
            return None
        longer = {s + part for s in sums}
        sums |= {s for s in longer if budget.is_within(s)}
        beyond = min([beyond, *(s for s in longer if not budget.is_within(s))])
    under = max(sums) + max_width_savings
    return None if budget.is_met(under) else (under, beyond)


def refuse_gap(savings_table: SavingsTable, goal: Budget, parts: Sequence[Parts]) -> None:
    """Reject (overshoots) where less can go and far more, and nothing between."""
    sizes = [
        p.savings_of(savings_table, name, goal.of) for p in parts if isinstance(p, RemovableParts) for name in p.names
    ]
    steps = (
        p.max_cuts(g) * p.stride(g) * savings_of_step(savings_table, g, goal.of)
        for p in parts
        if isinstance(p, WidthParts)
        for g in p.groups
        if p.max_cuts(g)
    )
    nearest = _gap_around_unmeetable_budget(goal, 0.0, sizes, sum(steps))
    if nearest is None or not math.isfinite(nearest[1]):  # more than there is: another refusal says so
        return
    under, beyond = (value / goal.total for value in nearest)
    raise overshoots(
        f"{goal.goal / goal.total:.1%} of {goal.of} are to go, and the parts that can go are so large that "
        f"{under:.1%} go or {beyond:.1%}",
        help=f"remove {percent_floor(under)}, or {math.ceil(1000 * beyond / (1 + SPARE)) / 10:g}% or more, cut in "
        "smaller steps, let other modules or kinds be cut, or allow it with `overshoot: true`",
        argument="remove",
    ).rejection()


def affordable_candidates(
    pool_candidate_pairs: list[tuple[Pool, Candidate]],
    pools: Sequence[Pool],
    already_saved: float,
    budget: Budget,
    overall_goal: Budget | None,
) -> list[tuple[Pool, Candidate]]:
    """Candidates that don't go far beyond a budget, and behind which it can still be met; all where there are none.

    overall_goal  the goal of all turns, beyond which nothing may go far. Raises Reject (overshoots) where all would.
    """
    within = [(pool, c) for pool, c in pool_candidate_pairs if budget.is_within_with_cut(already_saved, c)]
    if overall_goal is None:
        return within or pool_candidate_pairs
    if not within:
        refuse_overshoot(min(c.saves(budget.of) for _, c in pool_candidate_pairs), already_saved, overall_goal)
    return _candidates_leaving_budget_meetable(within, pools, already_saved, budget) or within or pool_candidate_pairs


def _candidates_leaving_budget_meetable(
    pool_candidate_pairs: list[tuple[Pool, Candidate]], pools: Sequence[Pool], already_saved: float, budget: Budget
) -> list[tuple[Pool, Candidate]]:
    sizes = [candidate.saves(budget.of) for _, candidate in pool_candidate_pairs]
    each = [
        sum(size for (owner, _), size in zip(pool_candidate_pairs, sizes, strict=True) if owner is pool)
        for pool in pools
    ]
    widths = sum(max(0.0, pool.reachable(budget.of) - once) for pool, once in zip(pools, each, strict=True))
    if can_be_met(budget, already_saved, (), widths):  # whatever goes first
        return pool_candidate_pairs
    return [
        pair
        for at, pair in enumerate(pool_candidate_pairs)
        if can_be_met(budget, already_saved + sizes[at], sizes[:at] + sizes[at + 1 :], widths)
    ]

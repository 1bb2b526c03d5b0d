"""Estimated result of a search, for `plan`: even cuts that meet a budget, as the search's cuts will."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from ....dsl.checker.skeleton import Group, Skeleton
from .budget import Budget
from .parts import LayerParts, Parts, RemovableParts, WidthParts
from .savings import OF_MODEL, SCANS, SavingsTable, step_count_of, with_fewer_steps
from .uniform_widths import group_in_skeleton


class ShrunkSkeleton(NamedTuple):
    skeleton: Skeleton
    n_cuts: int


def shrink_to_budget(skeleton: Skeleton, goal: Budget, part_kinds: Sequence[Parts]) -> ShrunkSkeleton:
    """The skeleton when a budget is met.

    Groups are narrowed alike. Kinds whose cuts are large come first and give no more than smaller cuts can't, so that
    little more goes than is asked for. Of whole parts the smallest go where groups don't suffice.
    """
    full_size, savings_table = _budget_total(skeleton, goal.of, part_kinds), SavingsTable(skeleton)

    def saved(remaining: Skeleton) -> float:
        return full_size - _budget_total(remaining, goal.of, part_kinds)

    def met(remaining: Skeleton) -> bool:
        return goal.is_met(saved(remaining))

    widths = [kind for kind in part_kinds if isinstance(kind, WidthParts) and kind.groups]
    can = {
        kind.kind: sum(kind.max_cuts(g) * _savings_of_cut(savings_table, kind, g, goal.of) for g in kind.groups)
        for kind in widths
    }
    widths.sort(
        key=lambda kind: max(_savings_of_cut(savings_table, kind, g, goal.of) for g in kind.groups), reverse=True
    )
    left, cuts = skeleton, 0
    for number, kind in enumerate(widths):
        kind_goal = replace(goal, goal=goal.goal - sum(can[finer.kind] for finer in widths[number + 1 :]))
        left, cut_count = _narrow_evenly_and_count_cuts(left, kind_goal, saved, kind)
        cuts += cut_count
    for kind in widths:  # sides of one tensor save less together than each of them does alone
        left, cut_count = _narrow_evenly_and_count_cuts(left, goal, saved, kind)
        cuts += cut_count
    for removable in sorted((p for p in part_kinds if isinstance(p, RemovableParts)), key=lambda p: p.kind == SCANS):
        if not met(left):
            left, cut_count = removable.remove_smallest_or_largest_until_met(left, met)
            cuts += cut_count
    return ShrunkSkeleton(left, cuts)


def _budget_total(skeleton: Skeleton, quantity: str, parts: Sequence[Parts]) -> float:
    """Total of the quantity that the budget counts."""
    if quantity in OF_MODEL:
        return OF_MODEL[quantity](skeleton)
    if quantity == SCANS:
        return len(skeleton.scans)
    if quantity == "blocks":
        return len(skeleton.units if any(isinstance(p, LayerParts) for p in parts) else skeleton.branches)
    return sum(
        g.count if quantity.startswith("ssm_") else step_count_of(g) for g in skeleton.groups if g.kind == quantity
    )


def _savings_of_cut(savings_table: SavingsTable, width_parts: WidthParts, group: Group, quantity: str) -> float:
    """Savings of one cut of a group."""
    return width_parts.stride(group) * savings_table.savings_per_step(group.site, group.kind, quantity)


def _narrow_evenly_and_count_cuts(
    skeleton: Skeleton, goal: Budget, savings_of: Callable[[Skeleton], float], width_parts: WidthParts
) -> tuple[Skeleton, int]:
    """All groups narrowed by the same share, rounded down; then one step of each in turn until the budget is met."""
    left, savings_table = skeleton, SavingsTable(skeleton)
    missing = goal.goal - savings_of(left)
    if missing <= 0:
        return left, 0
    groups = [group_in_skeleton(skeleton, g) for g in width_parts.groups if _is_left(skeleton, g)]
    full = sum(width_parts.max_cuts(g) * _savings_of_cut(savings_table, width_parts, g, goal.of) for g in groups)
    share = min(1.0, missing / full) if full else 0.0
    cuts = {(g.site, g.kind): int(share * width_parts.max_cuts(g)) for g in groups}
    for group in groups:
        left = with_fewer_steps(
            left, (group.site, group.kind), cuts[group.site, group.kind] * width_parts.stride(group)
        )
    while not goal.is_met(savings_of(left)):
        able = [g for g in groups if cuts[g.site, g.kind] < width_parts.max_cuts(g)]
        if not able:
            break
        for group in able:
            left = with_fewer_steps(left, (group.site, group.kind), width_parts.stride(group))
            cuts[group.site, group.kind] += 1
            if goal.is_met(savings_of(left)):
                break
    return left, sum(cuts.values())


def _is_left(skeleton: Skeleton, group: Group) -> bool:
    return any((g.site, g.kind) == (group.site, group.kind) for g in skeleton.groups)

"""From a recipe's amount to a budget, and what can't be reached."""

import math
from collections.abc import Mapping, Sequence

from ....dsl.checker.skeleton import Group, Skeleton
from ....dsl.checker.values import Shares
from ....dsl.syntax.diagnostics import Fault
from ...analysis.planning.amount import SPARE, Amount, overshoots
from .budget import CUTS, Budget
from .parts import BlockParts, Parts, RemovableParts, ScanParts, WidthParts
from .refusals import out_of_reach, percent_floor
from .savings import OF_MODEL, SCANS, SavingsTable, model_total, step_count_of

too_coarse = Fault(
    "too-coarse",
    "A cut is larger than all that it could be cut from.\n\n"
    "Of a kind of which nothing can go, a search would say nothing, and its budget would come from the others.",
)


def make_budget(skeleton: Skeleton, amount: Amount, item_kind: str, available_total: float | None = None) -> Budget:
    """Budget of an amount: of the quantity that its ratio is a share of, or of items of the kind.

    available_total  how much there is to choose from, where the skeleton doesn't say: items, or a measured latency
    """
    of = (
        amount.of if amount.of in OF_MODEL or amount.of == "latency" else item_kind
    )  # "heads" of mixers are "ssm_heads"
    if of == "latency":
        assert available_total is not None, "a latency is measured"
        return Budget(of, amount.value.value * available_total, available_total)
    if of in OF_MODEL:
        size = model_total(skeleton, of)
        share = amount.value.value * size
        return Budget(of, share if amount.removes else size - share, size)
    size = available_total if available_total is not None else int(model_total(skeleton, of))
    return Budget(of, size - amount.remaining_count(size), size)


def kinds_with_cumulative_shares(
    kind_order: Sequence[str], share_by_kind: Shares | None
) -> list[tuple[tuple[str, ...], float]]:
    """(kinds that compete, share of what is to go that must have gone when their turn ends)."""
    if share_by_kind is None:
        return [(tuple(kind_order), 1.0)]
    share_sum = sum(share_by_kind.share(kind) for kind in kind_order)
    result, total = [], 0.0
    for kind in kind_order:
        total += share_by_kind.share(kind) / share_sum if share_sum else 0.0
        result.append(((kind,), total))
    return [*result[:-1], (result[-1][0], 1.0)]  # 1.0: sums of shares are rounded


def max_savings(savings_table: SavingsTable, quantity: str, parts: Sequence[Parts]) -> float:
    """The most that can be saved, no more than there is: every whole part that may go, but of a model's last one
    its widths only; of a group all but what stays."""
    blocks = [b for p in parts if isinstance(p, BlockParts) for b in p.branches]
    inside = {site for b in blocks for site in savings_table.inside[b.site]}
    widths: dict[tuple[str, str], float] = {
        (g.site, g.kind): p.max_cuts(g) * p.stride(g) * savings_of_step(savings_table, g, quantity)
        for p in parts
        if isinstance(p, WidthParts)
        for g in p.groups
    }
    total = sum(saved for site, saved in widths.items() if site not in inside)
    for kind in parts:
        if isinstance(kind, RemovableParts):
            each = {
                name: kind.savings_of(savings_table, name, quantity)
                for name in kind.names
                if not (isinstance(kind, ScanParts) and (name, SCANS) in inside)
            }
            total += sum(each.values())
            if each and len(each) == kind.all:
                within = savings_table.inside if isinstance(kind, BlockParts) else {}
                total -= min(
                    saved - sum(widths.get(site, 0.0) for site in within.get(name, ())) for name, saved in each.items()
                )
    return total


def savings_of_step(savings_table: SavingsTable, group: Group, quantity: str) -> float:
    """Savings of a step of a group; of a mixer's items every block loses one."""
    if quantity == group.kind and group.kind.startswith("ssm_"):
        return group.count // step_count_of(group)
    return savings_table.savings_per_step(group.site, group.kind, quantity)


def refuse_oversized_step(parameter_name: str, step: int, groups: Sequence[Group]) -> None:
    """Reject a step that is larger than every group of its kind."""
    largest = max((step_count_of(g) for g in groups), default=step)
    if step > largest:
        noun = groups[0].kind.replace("_", " ").replace("kv", "KV")
        raise too_coarse(
            f"`{parameter_name}` is {step}, and no module has more than {largest} {noun}",
            help=f"write `{parameter_name}: {max(1, largest // 8)}`, or take that kind out of `order`",
            argument=parameter_name,
        ).rejection()


def refuse_unreachable(
    reachable_savings: float, budget: Budget, refusal_by_site: Mapping[str, str] | None = None
) -> None:
    """Reject a budget of which only `reachable_savings` can be saved; parts of `refusal_by_site` were left alone, each
    with its reason."""
    if budget.is_met(reachable_savings):
        return
    note = "; ".join(f"{site} stays: {reason}" for site, reason in list((refusal_by_site or {}).items())[:5])
    if budget.of == CUTS:
        raise out_of_reach(
            f"{budget.goal:g} cuts are to be made, and {reachable_savings:g} can",
            note=note,
            help=f"make at most {reachable_savings:g} cuts, or let more modules or kinds be cut",
            argument="keep remove",
        ).rejection()
    items = budget.of.removeprefix("ssm_")
    share, reach = budget.goal / budget.total, percent_floor(reachable_savings / budget.total)
    less = "" if reach == "0%" else f"remove at most {reach} of {items}, "
    raise out_of_reach(
        f"{share:.1%} of {items} are to go, and at most {reach} can",
        note=note,
        help=f"{less}cut in smaller steps, or let more modules or kinds be cut",
        argument="keep remove",
    ).rejection()


def min_savings_of_one_cut(savings_table: SavingsTable, quantity: str, parts: Sequence[Parts]) -> float:
    """Savings of the smallest cut of all; 0 where there is none."""
    savings = [
        part.savings_of(savings_table, name, quantity)
        for part in parts
        if isinstance(part, RemovableParts)
        for name in part.names
    ]
    for part in parts:
        if isinstance(part, WidthParts):
            savings += [
                savings_table.step_savings(g.site, g.kind, part.stride(g), quantity)
                for g in part.groups
                if part.max_cuts(g)
            ]
    return min((saved for saved in savings if saved > 0), default=0.0)


def refuse_overshoot(smallest_cut_savings: float, already_saved: float, goal: Budget) -> None:
    """Reject (overshoots) where even the smallest cut, which saves `smallest_cut_savings`, goes far beyond the goal."""
    if already_saved + smallest_cut_savings <= (1 + SPARE) * goal.goal:
        return
    share, each = goal.goal / goal.total, smallest_cut_savings / goal.total
    raise overshoots(
        f"{share:.1%} of {goal.of} are to go, and the smallest part that can go is {each:.1%}"
        + (f", with {already_saved / goal.total:.1%} gone" if already_saved else ""),
        help=f"remove {math.ceil(1000 * each / (1 + SPARE)) / 10:g}% or more, cut in smaller steps, let other "
        "modules or kinds be cut, or allow it with `overshoot: true`",
        argument="remove",
    ).rejection()

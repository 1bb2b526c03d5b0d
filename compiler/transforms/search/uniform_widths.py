"""Fewer channels or heads per site, the same share everywhere; which can be cut; what that comes to on paper."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ....dsl.checker.skeleton import Group, Skeleton
from ....dsl.checker.values import Ratio
from ....dsl.syntax.diagnostics import Reject
from ...analysis.discovery.discover import skeleton_of
from ...analysis.planning import shrink
from ...analysis.planning.amount import Amount
from ...core.events import Event, Said
from ...ir.capture.failed_forward import unsupported_model
from ..editing.dry_run import copy_on_meta, forward_runs, small_copy
from ..editing.rewrite import Rewriter
from .importance import ascending, l1_importance
from .refusals import out_of_reach
from .savings import steps, stride
from .widths import RankedGroup, slice_all, unit_of

if TYPE_CHECKING:
    from ...ir.program import Program


def narrow_evenly(
    program: "Program",
    groups: Sequence[Group],
    amount: Amount,
    align: int,
    listener: Callable[[Event], None] = lambda event: None,
    store: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Narrow every group that can be cut as `forecast_even_widths` says; the items of least weight magnitude go.

    listener   is told which groups stay, and why
    store  takes a tensor that is narrow now, and gives it from where it shall lie
    Raises Reject (out-of-reach) where none can.
    """
    left = {(g.site, g.kind): g.count for g in forecast_even_widths(skeleton_of(program), groups, amount, align).groups}
    sites = [RankedGroup(group, ascending(l1_importance(program, group))) for group in groups]
    removed = {
        (s.group.site, s.group.kind): s.size - left[s.group.site, s.group.kind] * s.size // s.group.count for s in sites
    }
    able, refusals = split_cuttable(program, [(s.group, removed[s.group.site, s.group.kind]) for s in sites])
    report_refusals(program, refusals, listener)
    if refusals and not any(removed[g.site, g.kind] for g in able):
        raise out_of_reach(
            f"none of the {len(refusals)} modules can be narrowed: {refusals[0][1]}",
            help="cut other kinds of parts, or whole blocks",
        ).rejection()
    cuts = [
        (s.group, set(s.least_important_items(removed[s.group.site, s.group.kind]))) for s in sites if s.group in able
    ]
    with Rewriter(program) as rewrite:
        slice_all(program, rewrite, [(group, items) for group, items in cuts if items], store)


def split_cuttable(
    program: "Program", cuts: Sequence[tuple[Group, int]]
) -> tuple[list[Group], list[tuple[Group, str]]]:
    """Split groups into those that the model runs without so many steps, and the others with why not.

    Tried on a copy without weights; all at once, and where that fails one of each kind of layer by itself.
    """
    trials = [(group, count) for group, count in cuts if 0 < count < steps(group)]
    if not trials or _cut_refusal(program, trials) is None:
        return [group for group, _ in cuts], []
    able, refusals, known = [group for group, count in cuts if (group, count) not in trials], [], {}
    for group, count in trials:
        unit = unit_of(group.site, list(program.units))
        case = (
            (program.units[unit].key, group.site.removeprefix(unit), group.kind, group.count, count)
            if unit
            else (group.site, group.kind)
        )
        if case not in known:
            known[case] = group, _cut_refusal(program, [(group, count)])
        first, reason = known[case]
        if reason is None:
            able.append(group)
        else:
            refusals.append((group, reason.replace(first.site, group.site)))
    return [group for group, _ in cuts if group in able], refusals


def report_refusals(
    program: "Program", refusals: Sequence[tuple[Group, str]], listener: Callable[[Event], None]
) -> None:
    """Note which groups stay as they are and why, and tell of the first of them."""
    for group, reason in refusals:
        program.note(left=f"{group.site}:{group.kind}", why=reason)
    if refusals:
        (group, reason), further = refusals[0], f" and {len(refusals) - 1} others" if len(refusals) > 1 else ""
        listener(Said(f"{group.site}{further} can't lose {group.kind.replace('_', ' ')}: {reason}"))


def _cut_refusal(program: "Program", cuts: Sequence[tuple[Group, int]]) -> str | None:
    """Why a model does not run when groups have lost their first steps; None where it does, or nothing tells."""
    reason = _unsupported_forward_after(copy_on_meta(program), cuts)
    if reason is None or forward_runs(copy_on_meta(program)):
        return reason
    trial = small_copy(program)  # its code asks for numbers, as mixtures that look which experts were chosen do
    return None if trial is None else _unsupported_forward_after(trial, cuts)


def _unsupported_forward_after(trial: "Program", removals: Sequence[tuple[Group, int]]) -> str | None:
    sliced = [
        (g, set(RankedGroup(g, list(range(g.count))).least_important_items(n_removed))) for g, n_removed in removals
    ]
    try:
        with Rewriter(trial) as rewrite:
            slice_all(trial, rewrite, [(g, items) for g, items in sliced if items])
    except Reject as rejection:
        if any(d.fault is not unsupported_model for d in rejection.diagnostics):
            raise
        message = rejection.diagnostics[0].message
        where, line = message.partition(": ")[0], message.rpartition(" at ")[2]  # without Python's words between them
        return f"{where} with fewer of them, at {line}"
    return None


def forecast_even_widths(skeleton: Skeleton, groups: Sequence[Group], amount: Amount, align: int) -> Skeleton:
    """The skeleton with every group narrowed by the same share: exact when even, an estimate when searched."""
    if amount.of == "params":
        return _forecast_to_param_count(skeleton, groups, amount, align)
    for group in groups:
        remaining = amount.remaining_count(steps(group), stride(group, align)) * group.count // steps(group)
        skeleton = shrink.with_narrowed_group(skeleton, refreshed(skeleton, group), remaining)
    return skeleton


def _forecast_to_param_count(skeleton: Skeleton, groups: Sequence[Group], amount: Amount, align: int) -> Skeleton:
    """The largest share of the items that every group can keep within the parameters; Reject where none can."""
    full_size = left = shrink.param_count(skeleton)
    limit, largest = amount.remaining_count(full_size), max(steps(g) for g in groups)
    for remaining in range(largest // align, 0, -1):
        narrowed = forecast_even_widths(skeleton, groups, Amount(Ratio(remaining * align / largest, "")), align)
        left = shrink.param_count(narrowed)
        if left <= limit:
            return narrowed
    share = math.ceil(1000 * left / full_size) / 10
    raise out_of_reach(
        f"{100 * limit / full_size:.3g}% of params are to stay, and the narrowest widths keep {share:g}%",
        help=f"keep at least {share:g}% of params, or let `align` be less",
        argument="keep remove",
    ).rejection()


def refreshed(skeleton: Skeleton, group: Group) -> Group:
    """The group as it is in a skeleton that may have been narrowed since."""
    return next(g for g in skeleton.groups if (g.site, g.kind) == (group.site, group.kind))

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
from ..editing.dry_run import copy_on_meta, copy_with_weights_if_small, forward_runs
from ..editing.rewrite import Rewriter
from .importance import ascending_indices, l1_importance
from .refusals import out_of_reach
from .savings import step_count_of, steps_per_cut
from .widths import RankedGroup, slice_groups, unit_of

if TYPE_CHECKING:
    from ...ir.program import Program


def narrow_evenly_and_report(
    program: "Program",
    groups: Sequence[Group],
    amount: Amount,
    align: int,
    on_event: Callable[[Event], None] = lambda event: None,
    store_tensor: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Narrow every group that can be cut as `forecast_even_widths` says; the items of least weight magnitude go.

    on_event   is told which groups stay, and why
    store_tensor  takes a tensor that is narrow now, and gives it from where it shall lie
    Raises Reject (out-of-reach) where none can.
    """
    left = {(g.site, g.kind): g.count for g in forecast_even_widths(skeleton_of(program), groups, amount, align).groups}
    sites = [RankedGroup(group, ascending_indices(l1_importance(program, group))) for group in groups]
    removed = {
        (s.group.site, s.group.kind): s.size - left[s.group.site, s.group.kind] * s.size // s.group.count for s in sites
    }
    able, refusals = split_cuttable_and_uncuttable(
        program, [(s.group, removed[s.group.site, s.group.kind]) for s in sites]
    )
    note_and_report_refusals(program, refusals, on_event)
    if refusals and not any(removed[g.site, g.kind] for g in able):
        raise out_of_reach(
            f"none of the {len(refusals)} modules can be narrowed: {refusals[0][1]}",
            help="cut other kinds of parts, or whole blocks",
        ).rejection()
    cuts = [
        (s.group, set(s.least_important_per_block(removed[s.group.site, s.group.kind])))
        for s in sites
        if s.group in able
    ]
    with Rewriter(program) as rewrite:
        slice_groups(program, rewrite, [(group, items) for group, items in cuts if items], store_tensor)


def split_cuttable_and_uncuttable(
    program: "Program", groups_and_step_counts: Sequence[tuple[Group, int]]
) -> tuple[list[Group], list[tuple[Group, str]]]:
    """Split groups into those that the model runs without so many steps, and the others with why not.

    Tried on a copy without weights; all at once, and where that fails one of each kind of layer by itself.
    """
    trials = [(group, count) for group, count in groups_and_step_counts if 0 < count < step_count_of(group)]
    if not trials or _refusal_of_cuts(program, trials) is None:
        return [group for group, _ in groups_and_step_counts], []
    able, refusals, known = [group for group, count in groups_and_step_counts if (group, count) not in trials], [], {}
    for group, count in trials:
        unit = unit_of(group.site, list(program.units))
        case = (
            (program.units[unit].key, group.site.removeprefix(unit), group.kind, group.count, count)
            if unit
            else (group.site, group.kind)
        )
        if case not in known:
            known[case] = group, _refusal_of_cuts(program, [(group, count)])
        first, reason = known[case]
        if reason is None:
            able.append(group)
        else:
            refusals.append((group, reason.replace(first.site, group.site)))
    return [group for group, _ in groups_and_step_counts if group in able], refusals


def note_and_report_refusals(
    program: "Program", refusals: Sequence[tuple[Group, str]], on_event: Callable[[Event], None]
) -> None:
    """Note which groups stay as they are and why, and tell of the first of them."""
    for group, reason in refusals:
        program.note(left=f"{group.site}:{group.kind}", why=reason)
    if refusals:
        (group, reason), further = refusals[0], f" and {len(refusals) - 1} others" if len(refusals) > 1 else ""
        on_event(Said(f"{group.site}{further} can't lose {group.kind.replace('_', ' ')}: {reason}"))


def _refusal_of_cuts(program: "Program", groups_and_step_counts: Sequence[tuple[Group, int]]) -> str | None:
    """Why a model does not run when groups have lost their first steps; None where it does, or nothing tells."""
    reason = _slice_copy_and_get_refusal(copy_on_meta(program), groups_and_step_counts)
    if reason is None or forward_runs(copy_on_meta(program)):
        return reason
    trial = copy_with_weights_if_small(
        program
    )  # its code asks for numbers, as mixtures that look which experts were chosen do
    return None if trial is None else _slice_copy_and_get_refusal(trial, groups_and_step_counts)


def _slice_copy_and_get_refusal(
    trial_copy: "Program", groups_and_step_counts: Sequence[tuple[Group, int]]
) -> str | None:
    sliced = [
        (g, set(RankedGroup(g, list(range(g.count))).least_important_per_block(n_removed)))
        for g, n_removed in groups_and_step_counts
    ]
    try:
        with Rewriter(trial_copy) as rewrite:
            slice_groups(trial_copy, rewrite, [(g, items) for g, items in sliced if items])
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
        return _forecast_widths_within_params(skeleton, groups, amount, align)
    for group in groups:
        remaining = (
            amount.remaining_count(step_count_of(group), steps_per_cut(group, align))
            * group.count
            // step_count_of(group)
        )
        skeleton = shrink.with_narrowed_group(skeleton, group_in_skeleton(skeleton, group), remaining)
    return skeleton


def _forecast_widths_within_params(skeleton: Skeleton, groups: Sequence[Group], amount: Amount, align: int) -> Skeleton:
    """The largest share of the items that every group can keep within the parameters; Reject where none can."""
    full_size = left = shrink.param_count(skeleton)
    limit, largest = amount.remaining_count(full_size), max(step_count_of(g) for g in groups)
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


def group_in_skeleton(skeleton: Skeleton, group: Group) -> Group:
    """The group as it is in a skeleton that may have been narrowed since."""
    return next(g for g in skeleton.groups if (g.site, g.kind) == (group.site, group.kind))

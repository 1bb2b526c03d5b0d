"""Fewer channels or heads per site, the same share everywhere; and what a cut of widths comes to on paper."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...dsl.diagnostics import Reject
from ...dsl.skeleton import Group, Skeleton
from ...dsl.values import Ratio
from ..editing.rewrite import Rewriter
from ..planning import shrink
from ..planning.amount import Amount
from .importance import ascending, l1
from .loop import out_of_reach
from .saving import steps
from .widths import Site, slice_all

if TYPE_CHECKING:
    from ..ir.program import Program


def narrow_evenly(program: "Program", groups: Sequence[Group], amount: Amount, align: int) -> None:
    """Every group is narrowed as `forecast` says; the items of least weight magnitude go."""
    left = {(g.site, g.kind): g.count for g in forecast(program.skeleton, groups, amount, align).groups}
    sites = [Site(group, ascending(l1(program, group))) for group in groups]
    cuts = [(s.group, set(s.next(s.size - left[s.group.site, s.group.kind] * s.size // s.group.count)))
            for s in sites]
    with Rewriter(program) as rewrite:
        slice_all(program, rewrite, [(group, gone) for group, gone in cuts if gone])


def forecast(skeleton: Skeleton, groups: Sequence[Group], amount: Amount, align: int) -> Skeleton:
    """The skeleton with every group narrowed by the same share: exact when even, an estimate when searched."""
    if amount.of == "params":
        return _forecast_params(skeleton, groups, amount, align)
    for group in groups:
        kept = amount.kept(steps(group), align) * group.count // steps(group)
        skeleton = shrink.narrowed(skeleton, again(skeleton, group), kept)
    return skeleton


def forwards(skeleton: Skeleton, groups: Sequence[Group], amount: Amount, align: int) -> int:
    """How many scores an exact search takes: about one per site and cut."""
    after = {(g.site, g.kind): g.count for g in forecast(skeleton, groups, amount, align).groups}
    cuts = sum((g.count - after[g.site, g.kind]) * steps(g) // g.count // align for g in groups)
    return cuts * len(groups)


def _forecast_params(skeleton: Skeleton, groups: Sequence[Group], amount: Amount, align: int) -> Skeleton:
    """The largest share of the items that every group can keep within the parameters; Reject where none can."""
    whole = left = shrink.params(skeleton)
    limit, most = amount.kept(whole), max(steps(g) for g in groups)
    for kept in range(most // align, 0, -1):
        found = forecast(skeleton, groups, Amount(Ratio(kept * align / most, "")), align)
        left = shrink.params(found)
        if left <= limit:
            return found
    share = math.ceil(1000 * left / whole) / 10
    raise Reject(out_of_reach(f"{limit / whole:.1%} of params are to stay, and the narrowest widths keep {share:g}%",
                              help=f"keep at least {share:g}% of params, or let `align` be less"))


def again(skeleton: Skeleton, group: Group) -> Group:
    """The group as it is in a skeleton that may have been narrowed since."""
    return next(g for g in skeleton.groups if (g.site, g.kind) == (group.site, group.kind))

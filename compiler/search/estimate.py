"""What a search will probably leave, for `plan`: even cuts that meet a budget."""

from collections.abc import Sequence

from ...dsl.skeleton import Branch, Group, Skeleton
from ..planning import shrink
from .loop import Budget
from .narrowing import again
from .saving import Ledger, steps, whole


def thinned(skeleton: Skeleton, goal: Budget, groups: Sequence[Group], step: int,
            branches: Sequence[Branch]) -> Skeleton:
    """The skeleton with all groups narrowed alike until the budget is met; of the branches given, the smallest go
    first where that does not suffice."""
    ledger, target = Ledger(skeleton), goal.total - goal.goal
    each = {g.site: ledger.of_step(g.site, g.kind, goal.of) for g in groups}
    most = sum((steps(g) - 1) // step * step * each[g.site] for g in groups)
    share = min(1.0, goal.goal / most) if most else 0.0
    left = skeleton
    for group in groups:
        size = steps(group)
        gone = min(round(share * (size - 1) / step) * step, (size - 1) // step * step)
        if gone:
            left = shrink.narrowed(left, again(left, group), (size - gone) * group.count // size)
    for branch in sorted(branches, key=lambda b: ledger.of_branch(b.site, "params")):
        if whole(left, goal.of) <= target * 1.02 or len(left.branches) <= 1:      # 1.02: steps don't hit it exactly
            break
        left = shrink.without_branch(left, next(b for b in left.branches if b.site == branch.site))
    return left

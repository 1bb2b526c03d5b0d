"""A search over parts of one kind: until enough of them, or of the model, is saved; and what it will come to."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from ...dsl.skeleton import Skeleton
from ...dsl.values import MetricRef
from .candidate import Pool
from .goals import refuse_unreached
from .loop import Budget, Search
from .ordering import choice_of
from .saving import OF_MODEL

if TYPE_CHECKING:
    from ..ir.program import Program
    from ..words.context import Context

T = TypeVar("T")


def cut_until_met(program: "Program", ctx: "Context", pool: Pool, score: MetricRef, goal: Budget, search: str,
                  most: float) -> None:
    """Raises Reject (out-of-reach) where `most`, or what in the end was saved, does not meet the goal."""
    refuse_unreached(most, goal)
    loop = Search(program, ctx)
    loop.run([pool], score, goal, choice_of(search, goal.of if goal.of in OF_MODEL else ""))
    refuse_unreached(loop.saved.get(goal.of, 0.0), goal)
    loop.finish([pool])


def foreseen(skeleton: Skeleton, goal: Budget, candidates: Sequence[T],
             without: Callable[[Skeleton, T], Skeleton | None]) -> tuple[Skeleton, int]:
    """The skeleton when candidates go in this order until the goal is met, and how many scores an exact search takes.

    without   the skeleton without one of them; None where it must stay
    """
    saved, scored = 0.0, 0
    for number, candidate in enumerate(candidates):
        less = None if goal.is_met(saved) else without(skeleton, candidate)
        if less is None:
            break
        saved += OF_MODEL[goal.of](skeleton) - OF_MODEL[goal.of](less) if goal.of in OF_MODEL else 1
        skeleton, scored = less, scored + len(candidates) - number
    return skeleton, scored

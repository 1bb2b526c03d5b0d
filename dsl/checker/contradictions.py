"""Bounds of one pipeline that no value can keep, alone or together."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..syntax.diagnostics import Fault
from .recipe import Bound
from .scope import Scope
from .units import comparable_number
from .value_text import bound_text, value_text
from .values import Bytes, Duration, MetricRef, Range

MAX_REPORTS = 50  # of a pipeline

contradicting_bounds = Fault("contradicting-bounds", "Two bounds on one metric leave no value that keeps both.")


unreachable_bound = Fault(
    "unreachable-bound",
    "A bound that nothing can keep: its metric never has such a value, or the plan foresees a size beyond it.\n\n"
    "Of a search of steps it is the smallest candidate's size that is beyond it, or the original misses a bound on "
    "quality by more than half of its limit: mostly one that lacks `* base`.",
)


worse_side = Fault(
    "worse-side", "A bound keeps a metric from being better, and nothing keeps it from being worse.", severity="warning"
)


class _End(NamedTuple):
    """End of the values that keep a bound; of a highest one its negative, so that the greater end is the stricter."""

    value: float  # number, bytes, seconds, or factor of the baseline
    is_open: bool
    bound: Bound


def report_contradicting_bounds(bounds: Sequence[Bound], scope: Scope) -> None:
    """Report bounds that no model keeps, and those that exclude what the ones before them leave of one metric of one
    artifact, with one baseline."""
    strictest: dict[tuple[object, ...], tuple[_End, _End]] = {}
    reports = 0
    for bound in (b for b in bounds if not _is_unreachable_and_reported(b, scope)):
        subject = bound.metric, bound.baseline, bound.part, bound.profile
        low, high = _lowest_and_highest(bound)
        least, greatest = strictest.get(subject, (low, high))
        other = (
            greatest
            if _leaves_no_value_between(low, greatest)
            else least
            if _leaves_no_value_between(least, high)
            else None
        )
        if other is None:
            strictest[subject] = max(least, low, key=_value_and_openness), max(greatest, high, key=_value_and_openness)
            continue
        scope.report(
            contradicting_bounds(
                f"`{bound_text(bound)}` and `{bound_text(other.bound)}` can't both hold",
                bound.span,
                related=((other.bound.span, "the other bound"),) if other.bound.span else (),
                help="drop one of them",
            )
        )
        reports += 1
        if reports == MAX_REPORTS:
            return


def report_bounds_on_worse_side(bounds: Sequence[Bound], scope: Scope) -> None:
    """Warn of `perplexity(text) >= 20` and `accuracy(rows) <= 0.8` where nothing bounds the other side."""
    better_sides: dict[Any, tuple[str, ...]] = {"lower": (">=", ">"), "higher": ("<=", "<")}
    operators: dict[MetricRef, set[str]] = {}
    for bound in bounds:
        operators.setdefault(bound.metric, set()).add(bound.op)
    for bound in {b.metric: b for b in bounds}.values():
        better = scope.session.vocabulary.words("metric")[bound.metric.name].facts.get("better")
        if not operators[bound.metric].issubset(better_sides.get(better, ())):
            continue
        opposite = bound.op.translate(str.maketrans("<>", "><"))
        message = f"`{bound.metric.name}` is better the {better} it is, and this bound holds where it is worse"
        scope.report(worse_side(message, bound.span, help=f"write `{opposite}`, or add a bound with it"))


def _is_unreachable_and_reported(bound: Bound, scope: Scope) -> bool:
    """Whether a bound without a baseline is reported: it lies beyond all values of its metric."""
    if bound.baseline is not None:
        return False
    facts = scope.session.vocabulary.words("metric")[bound.metric.name].facts
    lowest, highest = facts.get("lowest"), facts.get("highest")
    low, high = _lowest_and_highest(bound)
    if lowest is not None and _leaves_no_value_between(_End(lowest, False, bound), high):
        reason = f"never below {_value_text(lowest, bound.limit)}"
    elif highest is not None and _leaves_no_value_between(low, _End(-highest, False, bound)):
        reason = f"never above {_value_text(highest, bound.limit)}"
    else:
        return False
    scope.report(
        unreachable_bound(
            f"`{bound.metric.name}` of a model is {reason}",
            bound.span,
            help="write a limit that a model can keep, or a share of the original's: `0.9 * base`",
        )
    )
    return True


def _value_text(value: float, limit: Any) -> str:
    """A value of a metric, written as its limits are."""
    match limit.low if isinstance(limit, Range) else limit:
        case Bytes():
            return f"{value:g} byte"
        case Duration():
            return value_text(Duration(value))
    return value_text(value)


def _lowest_and_highest(bound: Bound) -> tuple[_End, _End]:
    """Lowest and highest value that keeps a bound."""
    if isinstance(bound.limit, Range):
        low, high = sorted((comparable_number(bound.limit.low), comparable_number(bound.limit.high)))
        return _End(low, False, bound), _End(-high, False, bound)
    limit, is_open = comparable_number(bound.limit), bound.op in ("<", ">")
    low = limit if bound.op in (">=", ">", "==") else -math.inf
    high = limit if bound.op in ("<=", "<", "==") else math.inf
    return _End(low, is_open, bound), _End(-high, is_open, bound)


def _value_and_openness(end: _End) -> tuple[float, bool]:
    return end.value, end.is_open


def _leaves_no_value_between(low: _End, high: _End) -> bool:
    """Whether no value lies between two ends."""
    return low.value + high.value > 0 or (low.value + high.value == 0 and (low.is_open or high.is_open))

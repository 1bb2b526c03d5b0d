"""Bounds of one pipeline that no value can keep together."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ..syntax.diagnostics import Fault
from .recipe import Bound
from .scope import Scope
from .units import magnitude
from .value_text import value_text
from .values import Range

MAX_REPORTS = 50  # of a pipeline

contradicting_bounds = Fault("contradicting-bounds", "Two bounds on one metric leave no value that keeps both.")


class _End(NamedTuple):
    """End of the values that keep a bound; of a highest one its negative, so that the greater end is the stricter."""

    value: float  # number, bytes, seconds, or factor of the baseline
    is_open: bool
    bound: Bound


def report_contradicting_bounds(bounds: Sequence[Bound], scope: Scope) -> None:
    """Report bounds that exclude what those before them leave of one metric of one artifact, with one baseline."""
    strictest: dict[tuple[object, ...], tuple[_End, _End]] = {}
    reports = 0
    for bound in bounds:
        subject = bound.metric, bound.baseline, bound.part, bound.profile
        low, high = _ends(bound)
        least, greatest = strictest.get(subject, (low, high))
        other = greatest if _excludes(low, greatest) else least if _excludes(least, high) else None
        if other is None:
            strictest[subject] = max(least, low, key=_strictness), max(greatest, high, key=_strictness)
            continue
        scope.report(
            contradicting_bounds(
                f"`{_bound_text(bound)}` and `{_bound_text(other.bound)}` can't both hold",
                bound.span,
                related=((other.bound.span, "the other bound"),) if other.bound.span else (),
                help="drop one of them",
            )
        )
        reports += 1
        if reports == MAX_REPORTS:
            return


def _ends(bound: Bound) -> tuple[_End, _End]:
    """Lowest and highest value that keeps a bound."""
    if isinstance(bound.limit, Range):
        low, high = sorted((magnitude(bound.limit.low), magnitude(bound.limit.high)))
        return _End(low, False, bound), _End(-high, False, bound)
    limit, is_open = magnitude(bound.limit), bound.op in ("<", ">")
    low = limit if bound.op in (">=", ">", "==") else -math.inf
    high = limit if bound.op in ("<=", "<", "==") else math.inf
    return _End(low, is_open, bound), _End(-high, is_open, bound)


def _strictness(end: _End) -> tuple[float, bool]:
    return end.value, end.is_open


def _excludes(low: _End, high: _End) -> bool:
    """Whether no value lies between two ends."""
    return low.value + high.value > 0 or (low.value + high.value == 0 and (low.is_open or high.is_open))


def _bound_text(bound: Bound) -> str:
    return bound.span.text if bound.span else value_text(bound.metric)

"""Bounds of one pipeline that no value can keep together."""

import math
from collections.abc import Sequence
from itertools import combinations

from ..syntax.diagnostics import Fault
from .recipe import Bound
from .scope import Scope
from .units import magnitude
from .value_text import value_text
from .values import Range

contradicting_bounds = Fault("contradicting-bounds", "Two bounds on one metric leave no value that keeps both.")


def report_contradicting_bounds(bounds: Sequence[Bound], scope: Scope) -> None:
    """Report pairs of bounds on one metric of one artifact, with one baseline, that exclude each other."""
    for first, second in combinations(bounds, 2):
        if _subject(first) != _subject(second):
            continue
        (low, high), (other_low, other_high) = _interval(first), _interval(second)
        if max(low, other_low) > min(high, other_high):
            scope.report(
                contradicting_bounds(
                    f"`{_text(second)}` and `{_text(first)}` can't both hold",
                    second.span,
                    related=((first.span, "the other bound"),) if first.span else (),
                    help="drop one of them",
                )
            )


def _subject(bound: Bound) -> tuple[object, ...]:
    return bound.metric, bound.baseline, bound.part, bound.profile


def _interval(bound: Bound) -> tuple[float, float]:
    """Values that keep a bound: numbers, bytes, seconds, or factors of the baseline."""
    if isinstance(bound.limit, Range):
        ends = magnitude(bound.limit.low), magnitude(bound.limit.high)
        return min(ends), max(ends)
    limit = magnitude(bound.limit)
    low = limit if bound.op in (">=", ">", "==") else -math.inf
    return low, limit if bound.op in ("<=", "<", "==") else math.inf


def _text(bound: Bound) -> str:
    return bound.span.text if bound.span else value_text(bound.metric)

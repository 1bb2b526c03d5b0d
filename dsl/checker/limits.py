"""Bounds of parameters: the least, the most, and the values that a `param` allows."""

import re
from collections.abc import Callable
from math import isfinite
from typing import Any

from ..syntax.control_characters import control_in, refused
from ..syntax.diagnostics import Diagnostic, Fault, Fix
from ..syntax.source import Span
from .units import magnitude
from .value_text import plain, show
from .values import Bytes, Duration, Range, Ratio, Selector, Shares
from .vocabulary import Param

out_of_range = Fault("out-of-range", "A value lies outside the bounds that its parameter declares.")

ill_spelled = Fault("ill-spelled", "A text is not written as its parameter asks for.")

LONGEST = 4096  # characters of a text: no path is longer
WHOLE = (-(2**63), 2**63 - 1)  # what libraries hold whole numbers in
SEEDS = (0, 2**32 - 1)  # what all of their generators take
NUMERIC = (int, float, Ratio, Bytes, Duration)


def within(value: Any, want: Param, span: Span, report: Callable[[Diagnostic], None]) -> bool:
    """Whether a value, or every item of a list, keeps the bounds; reports the first that doesn't."""
    if isinstance(value, (tuple, list)):
        return all(within(v, want, span, report) for v in value)
    if isinstance(value, Range):
        return within(value.low, want, span, report) and within(value.high, want, span, report)
    if isinstance(value, Shares):
        return _shared_out(value, want, span, report)
    texts = [glob for _, glob in value.terms] if isinstance(value, Selector) else [value]
    if isinstance(texts[0], str) and (found := control_in("".join(texts), want.lines)):
        report(refused(f"`{want.name}`", found, span))
        return False
    if isinstance(value, str) and len(value) > LONGEST:
        report(out_of_range(f"`{want.name}` has {len(value)} characters, the most is {LONGEST}", span))
        return False
    if isinstance(value, str) and want.spelled and not re.fullmatch(want.spelled, value):
        sample = f"write it like `{want.name}: {show(want.default)}`" if isinstance(want.default, str) else ""
        report(ill_spelled(f"`{want.name}` is {show(value)}, which says nothing", span, note=want.doc, help=sample))
        return False
    if isinstance(value, bool) or not isinstance(value, NUMERIC):
        return True
    if type(value) is int and (fault := _off_grid(value, want, span)):
        report(fault)
        return False
    for fits, limit, words in _limits(value, want):
        if not fits(magnitude(value), limit):
            bound = _like(value, limit)
            report(out_of_range(f"`{want.name}` is {show(value)}, {words.format(bound)}", span))
            return False
    return True


def _off_grid(value: int, want: Param, span: Span) -> Diagnostic | None:
    """A number that is none of those declared, no multiple, or even."""
    if want.among and value not in want.among:
        near = min(filter(None, want.among), key=lambda n: (abs(n - value), n))  # 0 is for none: nobody meant it
        *others, last = map(str, want.among)
        return out_of_range(
            f"`{want.name}` is {value}, which is none of {', '.join(others)} and {last}",
            span,
            help=f"write `{near}`",
            offer=Fix(span, str(near)),
        )
    if want.multiple and value % want.multiple:
        near = max(1, round(value / want.multiple)) * want.multiple
        return out_of_range(
            f"`{want.name}` is {value}, no multiple of {want.multiple}",
            span,
            help=f"write `{near}`",
            offer=Fix(span, str(near)),
        )
    if want.odd and value % 2 == 0:
        odd = str(max(1, value - 1))
        said = f"`{want.name}` is {value}, which is even"
        return out_of_range(said, span, help=f"write `{odd}`", offer=Fix(span, odd))
    return None


def _shared_out(value: Shares, want: Param, span: Span, report: Callable[[Diagnostic], None]) -> bool:
    """Whether shares are a division of something: none below zero, not all of them zero."""
    total = sum(part for _, part in value.parts)
    below = [(name, part) for name, part in value.parts if part < 0]
    if below:
        name, part = below[0]
        report(out_of_range(f"`{name}` of `{want.name}` is {show(part)}, the least is 0", span))
    elif total == 0:
        report(
            out_of_range(
                f"`{want.name}` sums to 0, which shares nothing out", span, help="give at least one name more than 0"
            )
        )
    elif not isfinite(total):
        report(
            out_of_range(
                f"`{want.name}` has shares too large to add up",
                span,
                help="only proportions count: write smaller numbers",
            )
        )
    else:
        return True
    return False


def _limits(value: Any, want: Param):
    """(test, limit, sentence) for every bound that holds for a value.

    Where a parameter takes a count or a share, its bounds are those of the count; a share is 0% to 100%.
    """
    counted = isinstance(value, Ratio) and any(
        t.removeprefix("list[").rstrip("]") in ("int", "float") for t in want.types
    )
    ge, gt, le, lt = (None,) * 4 if counted else (want.ge, want.gt, want.le, want.lt)
    if isinstance(value, Ratio) and (counted or want.of):
        ge = 0 if ge is None and gt is None else ge
        le = 1 if le is None and lt is None else le
    if type(value) is int:
        least, most = SEEDS if want.name == "seed" else WHOLE
        ge, le = least if ge is None else ge, most if le is None else le
    return [
        row
        for row in (
            (lambda v, x: v >= x, ge, "the least is {}"),
            (lambda v, x: v > x, gt, "it has to be more than {}"),
            (lambda v, x: v <= x, le, "the most is {}"),
            (lambda v, x: v < x, lt, "it has to be less than {}"),
        )
        if row[1] is not None
    ]


def _like(value: Any, limit: float) -> str:
    """A limit, written as the value is."""
    if isinstance(value, Ratio):
        return show(Ratio(limit))
    if isinstance(value, Bytes):
        return show(Bytes(int(limit)))
    return show(Duration(limit)) if isinstance(value, Duration) else show(limit)


def allowed(
    value: Any,
    bounds: Range | tuple | None,
    name: str,
    span: Span,
    report: Callable[[Diagnostic], None],
    declared: Span,
) -> bool:
    """Whether a value of a `param` lies in the range, or is one of the values, that its line allows."""
    if bounds is None:
        return True
    if isinstance(bounds, Range):
        fits = magnitude(bounds.low) <= magnitude(value) <= magnitude(bounds.high)
        said = f"outside {show(bounds)}"
    else:
        fits = value in bounds
        said = f"none of {', '.join(plain(b) for b in bounds)}"
    if not fits:
        related = (
            ()
            if declared.source is span.source and declared.start <= span.start < declared.end
            else ((declared, "allowed here"),)
        )
        report(out_of_range(f"`{name}` is {plain(value)}, {said}", span, related=related))
    return fits

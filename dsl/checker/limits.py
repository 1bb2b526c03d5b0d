"""Bounds of parameters: the least, the most, and the values that a `param` allows."""

import re
from collections.abc import Callable
from math import isfinite
from typing import Any

from ..syntax.control_characters import control_character_error, first_control_character
from ..syntax.diagnostics import Diagnostic, Fault, Fix
from ..syntax.source import Span
from .units import comparable_number
from .value_text import plain_value_text, value_text
from .values import Bytes, Duration, Range, Ratio, Selector, Shares
from .vocabulary import Param

out_of_range = Fault("out-of-range", "A value lies outside the bounds that its parameter declares.")

ill_spelled = Fault("ill-spelled", "A text is not written as its parameter asks for.")

LONGEST = 4096  # characters of a text: no path is longer
INT64_RANGE = (-(2**63), 2**63 - 1)  # what libraries hold whole numbers in
SEEDS = (0, 2**32 - 1)  # what all of their generators take
NUMERIC = (int, float, Ratio, Bytes, Duration)


def validate_or_report(value: Any, param: Param, span: Span, report: Callable[[Diagnostic], None]) -> bool:
    """Whether a value, or every item of a list, keeps the bounds; reports the first that doesn't."""
    if isinstance(value, (tuple, list)):
        return all(validate_or_report(v, param, span, report) for v in value)
    if isinstance(value, Range):
        return validate_or_report(value.low, param, span, report) and validate_or_report(
            value.high, param, span, report
        )
    if isinstance(value, Shares):
        return _are_valid_shares_or_report(value, param, span, report)
    texts = [glob for _, glob in value.terms] if isinstance(value, Selector) else [value]
    if isinstance(texts[0], str) and (character := first_control_character("".join(texts), param.lines)):
        report(control_character_error(f"`{param.name}`", character, span))
        return False
    if isinstance(value, str) and len(value) > LONGEST:
        report(out_of_range(f"`{param.name}` has {len(value)} characters, the most is {LONGEST}", span))
        return False
    if isinstance(value, str) and param.spelled and not re.fullmatch(param.spelled, value):
        sample = f"write it like `{param.name}: {value_text(param.default)}`" if isinstance(param.default, str) else ""
        report(
            ill_spelled(f"`{param.name}` is {value_text(value)}, which says nothing", span, note=param.doc, help=sample)
        )
        return False
    if isinstance(value, bool) or not isinstance(value, NUMERIC):
        return True
    if type(value) is int and (fault := _allowed_number_diagnostic(value, param, span)):
        report(fault)
        return False
    for fits, limit, words in _applicable_bound_tests(value, param):
        if not fits(comparable_number(value), limit):
            bound = _limit_text(value, limit)
            help_text = "write a time, such as `30min`" if isinstance(value, Duration) and limit == 0 else ""
            report(out_of_range(f"`{param.name}` is {value_text(value)}, {words.format(bound)}", span, help=help_text))
            return False
    return True


def _allowed_number_diagnostic(value: int, param: Param, span: Span) -> Diagnostic | None:
    """A number that is none of those declared, no multiple, or even."""
    if param.among and value not in param.among:
        closest = min(filter(None, param.among), key=lambda n: (abs(n - value), n))  # 0 is for none: nobody meant it
        *allowed_values, last = map(str, param.among)
        return out_of_range(
            f"`{param.name}` is {value}, which is none of {', '.join(allowed_values)} and {last}",
            span,
            help=f"write `{closest}`",
            offer=Fix(span, str(closest)),
        )
    if param.multiple and value % param.multiple:
        closest = max(1, round(value / param.multiple)) * param.multiple
        return out_of_range(
            f"`{param.name}` is {value}, no multiple of {param.multiple}",
            span,
            help=f"write `{closest}`",
            offer=Fix(span, str(closest)),
        )
    if param.parity == "odd" and value % 2 == 0:
        smaller = str(max(1, value - 1))
        message = f"`{param.name}` is {value}, which is even"
        return out_of_range(message, span, help=f"write `{smaller}`", offer=Fix(span, smaller))
    return None


def _are_valid_shares_or_report(value: Shares, param: Param, span: Span, report: Callable[[Diagnostic], None]) -> bool:
    """Whether shares are a division of something: none below zero, not all of them zero."""
    total = sum(part for _, part in value.parts)
    negative = [(name, part) for name, part in value.parts if part < 0]
    if negative:
        name, part = negative[0]
        report(out_of_range(f"`{name}` of `{param.name}` is {value_text(part)}, the least is 0", span))
    elif total == 0:
        report(
            out_of_range(
                f"`{param.name}` sums to 0, which shares nothing out", span, help="give at least one name more than 0"
            )
        )
    elif not isfinite(total):
        report(
            out_of_range(
                f"`{param.name}` has shares too large to add up",
                span,
                help="only proportions count: write smaller numbers",
            )
        )
    else:
        return True
    return False


def _applicable_bound_tests(value: Any, param: Param) -> list[tuple[Callable[[Any, Any], bool], Any, str]]:
    """(test, limit, sentence) for every bound that holds for a value.

    Where a parameter takes a count or a share, its bounds are those of the count; a share is 0% to 100%.
    """
    bounds_count = isinstance(value, Ratio) and any(
        t.removeprefix("list[").rstrip("]") in ("int", "float") for t in param.types
    )
    ge, gt, le, lt = (None,) * 4 if bounds_count else (param.ge, param.gt, param.le, param.lt)
    if isinstance(value, Ratio) and (bounds_count or param.of):
        ge = 0 if ge is None and gt is None else ge
        le = 1 if le is None and lt is None else le
    if type(value) is int:
        least, upper = SEEDS if param.name == "seed" else INT64_RANGE
        ge, le = least if ge is None else ge, upper if le is None else le
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


def _limit_text(value: Any, limit: float) -> str:
    """A limit, written as the value is."""
    if isinstance(value, Ratio):
        return value_text(Ratio(limit))
    if isinstance(value, Bytes):
        return value_text(Bytes(int(limit)))
    return value_text(Duration(limit)) if isinstance(value, Duration) else value_text(limit)


def is_allowed_or_report(
    value: Any,
    allowed_values: Range | tuple | None,
    name: str,
    span: Span,
    report: Callable[[Diagnostic], None],
    declared: Span,
) -> bool:
    """Whether a value of a `param` lies in the range, or is one of the values, that its line allows."""
    if allowed_values is None:
        return True
    if isinstance(allowed_values, Range):
        fits = (
            comparable_number(allowed_values.low) <= comparable_number(value) <= comparable_number(allowed_values.high)
        )
        where = f"outside {value_text(allowed_values)}"
    else:
        fits = value in allowed_values
        where = f"none of {', '.join(plain_value_text(b) for b in allowed_values)}"
    if not fits:
        related = (
            ()
            if declared.source is span.source and declared.start <= span.start < declared.end
            else ((declared, "allowed here"),)
        )
        report(out_of_range(f"`{name}` is {plain_value_text(value)}, {where}", span, related=related))
    return fits

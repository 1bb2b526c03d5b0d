"""Numbers, strings and selectors as values, before anything is known of names."""

import re
from math import isinf
from typing import Any

from ..syntax import ast
from ..syntax.diagnostics import Diagnostic, Fault
from ..syntax.nearest import nearest_name
from ..syntax.source import Span
from .limits import out_of_range
from .selectors import InvalidGlob, parse_glob
from .units import ALL, DURATIONS, SPOKEN_DURATIONS, comparable_number, parse_number_with_unit
from .value_text import value_text
from .values import Duration, Range, Selector

unknown_unit = Fault("unknown-unit", "A number has a unit that the language doesn't know.")
invalid_selector = Fault("bad-selector", "A selector can't be read: it is globs over module paths, joined by | - &.")
invalid_range = Fault("bad-range", "The ends of a range are of two types, or in the wrong order.")


class InvalidLiteral(Exception):
    """An expression that has no value; carries the diagnostic."""

    def __init__(self, diagnostic: Diagnostic):
        super().__init__(diagnostic.message)
        self.diagnostic = diagnostic


def literal_value(expr: ast.Expr) -> Any:
    """The value of a number, string, bool or range, by its own look; raises Conflict."""
    match expr:
        case ast.Number(digits, unit):
            return number_literal_value(expr, digits, unit)
        case ast.Text(value) | ast.Bool(value):
            return value
        case ast.Interval(low, high):
            return parse_range_limits(expr, literal_value(low), literal_value(high))
    raise AssertionError(f"no literal: {expr}")


def number_literal_value(expr: ast.Number, digits: str, unit: str) -> Any:
    value = parse_number_with_unit(digits, unit)
    if value is None:
        raise InvalidLiteral(unknown_unit(f"`{unit}` is no unit", expr.span, help=_unit_help(digits, unit)))
    if isinf(comparable_number(value)):
        raise InvalidLiteral(
            out_of_range(
                f"`{expr.span.text}` is larger than any number can be here", expr.span, help="write one below 1e300"
            )
        )
    return value


def _unit_help(digits: str, unit: str) -> str:
    """Remedy for an unknown unit: `90min` for `1h30min`, `2h` for `2hours`, or the nearest unit."""
    times = re.findall(r"(\d+(?:\.\d+)?)([a-z]+)", digits + unit)
    names = [SPOKEN_DURATIONS.get(name, name) for _, name in times]
    if times and "".join(n + u for n, u in times) == digits + unit and all(name in DURATIONS for name in names):
        seconds = sum(float(n) * DURATIONS[name] for (n, _), name in zip(times, names, strict=True))
        return f"write `{value_text(Duration(seconds))}`"
    if unit == "m":
        return f"write `{digits}min` for minutes, or `{digits}M` for millions"
    closest = nearest_name(unit, ALL)
    return f"did you mean `{digits}{closest}`?" if closest else f"units: {', '.join(ALL)}"


def parse_range_limits(expr: ast.Interval, low: Any, high: Any) -> Range:
    if not all(isinstance(comparable_number(end), (int, float)) and not isinstance(end, bool) for end in (low, high)):
        raise InvalidLiteral(
            invalid_range("the ends of the range are no numbers", expr.span, help="write it like `1..8`")
        )
    numbers = {int, float}
    if type(low) is not type(high) and not {type(low), type(high)} <= numbers:
        raise InvalidLiteral(
            invalid_range("the ends of the range are of two types", expr.span, help="write a unit behind both ends")
        )
    if comparable_number(low) > comparable_number(high):
        raise InvalidLiteral(
            invalid_range("the range ends before it begins", expr.span, help="put the lower end first")
        )
    return Range(low, high)


def parse_selector(expr: ast.Expr) -> Selector | None:
    """A selector from globs joined by operators; None where some part is no glob. Raises Conflict."""
    if isinstance(expr, ast.AllowEmpty):
        inner = parse_selector(expr.selector)
        return inner and Selector(inner.terms, allow_empty=True)
    terms = _operator_and_glob_of_terms("|", expr)
    return Selector(tuple(terms)) if terms else None


def _operator_and_glob_of_terms(preceding_operator: str, expr: ast.Expr) -> list[tuple[str, str]] | None:
    if isinstance(expr, ast.Text):
        refuse_invalid_glob(expr.value, expr.span)
        return [(preceding_operator, expr.value)]
    if not isinstance(expr, ast.Combine):
        return None
    left, right = (
        _operator_and_glob_of_terms(preceding_operator, expr.left),
        _operator_and_glob_of_terms(expr.op, expr.right),
    )
    if left and right and len(right) > 1:
        raise InvalidLiteral(
            invalid_selector(
                "the operators of a selector work from left to right, without groups",
                expr.right.span,
                help="order the terms so that no group is needed",
            )
        )
    return left + right if left and right else None


def refuse_invalid_glob(glob: str, span: Span) -> None:
    """Raises Conflict, at the place inside the quotes, for a glob that can't be read."""
    try:
        parse_glob(glob)
    except InvalidGlob as error:
        glob_span = span_inside_text(span, glob, error.start, error.end)
        raise InvalidLiteral(invalid_selector(error.message, glob_span, help=_glob_help(glob))) from None


def _glob_help(glob: str) -> str:
    if any(c in glob for c in "^$\\+()|[]{}"):
        return "selectors are globs: `*` in a name, `**` across names, `{a,b}` for either, `{0..3}` for numbers"
    return 'write paths like "layers.*.mlp"'


def span_inside_text(span: Span, text: str, start: int, end: int) -> Span:
    """The span of a part of a quoted string, or the whole where escapes make offsets differ."""
    at = span.text.find(text) if text else -1
    return Span(span.source, span.start + at + start, span.start + at + end) if at >= 0 and end > start else span

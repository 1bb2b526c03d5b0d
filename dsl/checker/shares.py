"""Named shares, `{blocks: 44, channels: 52, heads: 4}`: how something is divided among things with names."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..syntax import ast
from ..syntax.diagnostics import Diagnostic, Fault, Fix
from ..syntax.nearest import nearest_name
from ..syntax.source import Span
from .literals import InvalidLiteral
from .scope import POISON, Scope
from .type_phrases import joined_with_and
from .typed import typed_value, unit_mismatch
from .value_text import value_text
from .values import Ratio, Shares
from .vocabulary import Param

unknown_share = Fault("unknown-share", "A share is given to something that the parameter doesn't divide among.")
repeated_share = Fault("repeated-share", "One name is given two shares.")


def typed_shares(expr: ast.Pairs, param: Param, scope: Scope) -> Shares | Any:
    """The shares, every entry with its own faults, or POISON after one was reported.

    Only proportions count, so numbers and percentages are both welcome, though not side by side: `52` beside
    `44%` would be a hundred times what it looks like.
    """
    sound = _are_distinct_or_report(expr.entries, scope)
    entries: list[tuple[ast.Entry, float | Ratio]] = []
    for entry in expr.entries:
        fault = _unknown_share_diagnostic(entry.name.path, entry.name.span, param)
        if fault:
            scope.report(replace(fault, fix=_rename_fix(entry, param)))
        value = typed_value(entry.value, Param(entry.name.path, ("float", "ratio"), "", ge=0), scope)
        sound &= fault is None and value is not POISON
        entries.append((entry, value))
    if not sound or not _have_same_unit_or_report(entries, param, scope):
        return POISON
    return Shares(tuple((e.name.path, v.value if isinstance(v, Ratio) else v) for e, v in entries))


def checked_named_shares(expr: ast.Expr, shares: Shares, param: Param) -> Shares:
    """Shares that came by a name, theirs held against those of the parameter; raises Conflict."""
    for name, _ in shares.parts:
        if fault := _unknown_share_diagnostic(name, expr.span, param):
            raise InvalidLiteral(fault)
    return shares


def _unknown_share_diagnostic(name: str, span: Span, param: Param) -> Diagnostic | None:
    if not param.of or name in param.of:
        return None
    closest = nearest_name(name, param.of)
    return unknown_share(
        f"`{param.name}` has no share of `{name}`",
        span,
        help=f"did you mean `{closest}`?" if closest else f"there are {joined_with_and(param.of)}",
    )


def _rename_fix(entry: ast.Entry, param: Param) -> Fix | None:
    closest = nearest_name(entry.name.path, param.of)
    return Fix(entry.name.span, closest) if closest else None


def _are_distinct_or_report(entries: Iterable[ast.Entry], scope: Scope) -> bool:
    first: dict[str, ast.Entry] = {}
    sound = True
    for entry in entries:
        name = entry.name.path
        if first.setdefault(name, entry) is not entry:
            sound = False
            scope.report(
                repeated_share(
                    f"`{name}` has two shares",
                    entry.span,
                    related=((first[name].span, "the first"),),
                    help="drop one of them",
                )
            )
    return sound


def _have_same_unit_or_report(entries: list[tuple[ast.Entry, float | Ratio]], param: Param, scope: Scope) -> bool:
    """Whether all are percentages or none is; nothing is nothing in both."""
    nonzero = [(entry, value) for entry, value in entries if value not in (0, Ratio(0))]
    other = next(((e, v) for e, v in nonzero if isinstance(v, Ratio) != isinstance(nonzero[0][1], Ratio)), None)
    if other is None:
        return True
    entry, value = other
    expected = "a percentage" if isinstance(nonzero[0][1], Ratio) else "a number"
    scope.report(
        unit_mismatch(
            f"`{entry.name.path}` is {value_text(value)}, but `{nonzero[0][0].name.path}` is {expected}",
            entry.value.span,
            help=f"write all shares of `{param.name}` one way",
        )
    )
    return False

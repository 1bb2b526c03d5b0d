"""A syntax error and how parsing can go on after it."""

import re
from dataclasses import dataclass

from .diagnostics import Diagnostic, Fault, Fix
from .error_site import ErrorSite
from .source import Span

syntax = Fault("syntax", "The text does not follow the grammar of the language.")
not_closed = Fault("not-closed", "A parenthesis, bracket or brace is opened and never closed.")
not_opened = Fault("not-opened", "A parenthesis, bracket or brace is closed that was never opened.")
missing_comma = Fault("missing-comma", "Two arguments or items stand side by side without a comma.")
unexpected_sign = Fault("wrong-sign", "A sign such as `=` stands where another one, such as `:`, is meant.")
foreign_spelling = Fault("foreign-spelling", "Something is written as in Python, YAML, JSON or C.")
unknown_character = Fault("unknown-character", "A character has no meaning outside strings and comments.")
unterminated_string = Fault("unterminated-string", "A string is not closed on its line, or a docstring not at all.")
too_deep = Fault("too-deep", "Parentheses and brackets are nested deeper than any recipe needs.")

_unit = re.compile(r"%|[num]?s|min|h|d|[KMGT]i?B?|B")


@dataclass(frozen=True)
class SyntaxMistake:
    """`repairs`: parsing can go on, after feeding `put`, and without the token found if `skip`."""

    diagnostic: Diagnostic
    repairs: bool = False
    put: tuple[str, str] | None = None
    skip: bool = False

    @property
    def drops(self) -> bool:
        return self.repairs and self.skip and not self.put


def replace_token_mistake(
    error_site: ErrorSite,
    kind: str,
    text: str,
    message: str,
    help: str,
    fault: Fault = unexpected_sign,
    sure: bool = True,
) -> SyntaxMistake:
    span, around = error_site.span(error_site.token), error_site.source.text
    before = " " if kind == "EQUAL" and not around[span.start - 1].isspace() else ""
    after = " " if kind in ("EQUAL", "COLON") and not around[span.end : span.end + 1].isspace() else ""
    fix = Fix(span, before + text + after) if sure else None
    return SyntaxMistake(fault(message, span, help=help, fix=fix), True, (kind, text), True)


def remove_text_mistake(error_site: ErrorSite, span: Span, fault: Fault, message: str, help: str) -> SyntaxMistake:
    return SyntaxMistake(fault(message, span, help=help, fix=Fix(span, "")), True, None, True)


def is_unit(text: str) -> bool:
    return bool(_unit.fullmatch(text))


def spaced_unit_mistake(error_site: ErrorSite) -> SyntaxMistake | None:
    """`24 GiB`, where a unit stands apart from its number."""
    number, unit = error_site.previous, error_site.token
    is_spaced = number.type == "NUMBER" and number[-1].isdigit() and number.line == unit.line
    if not is_spaced or not is_unit(unit) or error_site.following.type in ("COLON", "EQUAL"):
        return None
    return join_unit_mistake(error_site, number, unit, repairs=True)


def join_unit_mistake(error_site: ErrorSite, number_token, unit_token, repairs: bool) -> SyntaxMistake:
    gap, both = (
        Span(error_site.source, *offsets)
        for offsets in ((number_token.end_pos, unit_token.start_pos), (number_token.start_pos, unit_token.end_pos))
    )
    fault = unexpected_sign(
        "a unit follows its number without a space", both, help=f"write `{number_token}{unit_token}`", fix=Fix(gap, "")
    )
    return SyntaxMistake(fault, repairs, None, repairs)

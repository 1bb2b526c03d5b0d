"""Diagnostics of syntax errors.

`TABLE` is keyed by the token found and the terminals that would fit, never by how the parser got there: the
same slip is told the same way wherever it stands. Rows are tried in order; the first that answers wins.
"""

from collections.abc import Callable

from .diagnostics import Fix
from .edition import DEPTH, HEADS
from .error_site import CLOSERS, OPENERS, ErrorSite
from .expected import ITEMS, SHARES, token_label, unexpected_token
from .source import Span
from .syntax_error import (
    SyntaxMistake,
    dropped,
    foreign_spelling,
    is_unit,
    join_unit_mistake,
    missing_comma,
    not_closed,
    not_opened,
    replace_token_mistake,
    spaced_unit_mistake,
    syntax,
    too_deep,
    wrong_sign,
)
from .unknown_tokens import bare_text, open_string, quoted, unknown_token

WORDS = {"True": "true", "False": "false"}


def diagnose(site: ErrorSite) -> SyntaxMistake:
    for types, expected, rule in TABLE:
        if (types is None or site.token.type in types) and expected <= site.expected:
            mistake = rule(site)
            if mistake is not None:
                return mistake
    return unexpected_token(site)


# Brackets


def _unclosed(site: ErrorSite) -> SyntaxMistake | None:
    token, open = site.token, site.open_brackets
    if not open:
        return None
    opener = site.tokens[open[-1]]
    at_end = (
        token.type == "$END" or site.is_head(site.at) or (site.inner and site.at > site.start and site.is_step(site.at))
    )
    crossed = (
        token.type in CLOSERS
        and opener.type != CLOSERS[token.type]
        and any(site.tokens[i].type == CLOSERS[token.type] for i in open)
    )
    if not (at_end or crossed):
        return None
    closer = OPENERS[opener.type]
    where = "the file ends here" if token.type == "$END" else f"`{closer}` is expected before this"
    return SyntaxMistake(
        not_closed(
            f"`{opener}` is not closed",
            site.span(token),
            label=where,
            related=((site.span(opener), "opened here"),),
            help=f"add `{closer}`",
        )
    )


def _unopened(site: ErrorSite) -> SyntaxMistake | None:
    if any(site.tokens[i].type == CLOSERS[site.token.type] for i in site.open_brackets):
        return None
    return SyntaxMistake(
        not_opened(f"`{site.token}` closes nothing", site.span(site.token), help="remove it, or open it earlier")
    )


def _too_deep(site: ErrorSite) -> SyntaxMistake | None:
    return (
        SyntaxMistake(
            too_deep(
                f"parentheses and brackets are nested more than {DEPTH} deep",
                site.span(site.token),
                help="split the list, or name parts of it",
            )
        )
        if site.deep
        else None
    )


# Signs and commas


def _equal_for_colon(site: ErrorSite) -> SyntaxMistake:
    name = site.previous
    if site.owner == "param":
        return SyntaxMistake(
            syntax(f"`{name}` has no type", site.span(name), help=f"write its type: `param {name}: ratio = ...`")
        )
    return replace_token_mistake(
        site,
        "COLON",
        ":",
        f"`{site.token}` stands where `:` is meant",
        f"arguments and entries are written `{name}: value`",
    )


def _colon_for_equal(site: ErrorSite) -> SyntaxMistake:
    return replace_token_mistake(
        site,
        "EQUAL",
        "=",
        f"`{site.token}` stands where `=` is meant",
        "declarations and steps are written `name = word(...)`",
    )


def _equal_for_compare(site: ErrorSite) -> SyntaxMistake:
    return replace_token_mistake(site, "COMPARE", "==", "`=` compares nothing", "write `<=`, `>=` or `==`", sure=False)


def _missing_comma(site: ErrorSite) -> SyntaxMistake | None:
    if not site.inner:
        return None
    unit = spaced_unit_mistake(site)
    if unit:
        return unit
    if site.token in ("off", "fo", "to", "out") and site.following.type == "NAME":
        return SyntaxMistake(
            syntax(
                f"`{site.token}` stands where `of` is expected",
                site.span(site.token),
                help="a share is written `85% of channels`",
            )
        )
    end = site.previous.end_pos
    gap = Span(site.source, end, end)
    if site.previous.type == "NAME" and "COLON" in site.expected and site.following.type != "COLON":
        return SyntaxMistake(
            wrong_sign(
                f"a `:` is missing after `{site.previous}`",
                site.span(site.token),
                help=f"arguments and entries are written `{site.previous}: value`",
                fix=Fix(gap, ":"),
            ),
            True,
            ("COLON", ":"),
        )
    return SyntaxMistake(
        missing_comma(
            f"a comma is missing before `{token_label(site.token)}`",
            site.span(site.token),
            help="arguments, items and shares are separated by `,`",
            fix=Fix(gap, ","),
        ),
        True,
        ("COMMA", ","),
    )


def _late_unit(site: ErrorSite) -> SyntaxMistake | None:
    """In a block, `24 GiB` looks like an entry named GiB until the next token."""
    if site.at != site.start + 1 or site.start < 2:
        return None
    number, unit = site.tokens[site.start - 1], site.tokens[site.start]
    if number.type != "NUMBER" or number.line != unit.line or not is_unit(unit):
        return None
    return join_unit_mistake(site, number, unit, repairs=False)


def _needless_comma(site: ErrorSite) -> SyntaxMistake | None:
    if site.inner:
        return None
    item = ITEMS.get(site.owner, ("", ""))[0].split(" ")[-1] or "statement"
    return dropped(
        site,
        site.span(site.token),
        wrong_sign,
        f"no comma stands between {_plural(item)}",
        "spaces or new lines are enough",
    )


def _plural(item: str) -> str:
    return item[:-1] + "ies" if item.endswith("y") else item + "s"


# Words


def _python_word(site: ErrorSite) -> SyntaxMistake | None:
    token = site.token
    if token in WORDS:
        return replace_token_mistake(
            site,
            WORDS[token].upper(),
            WORDS[token],
            f"`{token}` is written `{WORDS[token]}`",
            f"write `{WORDS[token]}`",
            foreign_spelling,
        )
    if token == "None":
        return SyntaxMistake(foreign_spelling("there is no `None`", site.span(token), help="leave the argument out"))
    return None


def _ratio_of_zeros(site: ErrorSite) -> SyntaxMistake | None:
    """`pattern: 2:4`, which is a text."""
    before, after = site.previous, site.following
    if before.type != "NUMBER" or after.type != "NUMBER" or before.end_pos != site.token.start_pos:
        return None
    both = Span(site.source, before.start_pos, after.end_pos)
    quoted = f'"{both.text}"'
    return SyntaxMistake(
        wrong_sign(f"`{both.text}` is written in quotes", both, help=f"write `{quoted}`", fix=Fix(both, quoted))
    )


def _pattern(site: ErrorSite) -> SyntaxMistake:
    return SyntaxMistake(
        syntax("a pattern stands outside quotes", site.span(site.token), help='write it in quotes: `"*.mlp"`')
    )


def _quoted_name(site: ErrorSite) -> SyntaxMistake | None:
    """`{"blocks": 44}`, as in JSON."""
    text = site.token[1:-1]
    if site.inner != "LBRACE" or not text.isidentifier() or not text.isascii():
        return None
    return replace_token_mistake(
        site, "NAME", text, "names of shares stand without quotes", f"write `{text}`", foreign_spelling
    )


def _unquoted_braces(site: ErrorSite) -> SyntaxMistake | None:
    """`{q,k}_proj`, whose braces look like shares."""
    if site.inner != "LBRACE" or site.tokens[site.at - 2].type not in ("LBRACE", "COMMA"):
        return None
    return SyntaxMistake(
        syntax(
            f"`{token_label(site.previous)}` has no share",
            site.span(site.previous),
            help=f"shares are written `{SHARES}`, lists `[a, b]`, patterns in quotes",
        )
    )


def _yaml_list(site: ErrorSite) -> SyntaxMistake:
    return SyntaxMistake(
        foreign_spelling("`-` starts no list", site.span(site.token), help="lists are written `[a, b]`")
    )


def _misplaced_factor(site: ErrorSite) -> SyntaxMistake | None:
    if site.previous.type != "STAR":
        return None
    base = site.tokens[site.at - 2]
    return SyntaxMistake(
        syntax("the factor stands before the baseline", site.span(site.token), help=f"write `{site.token} * {base}`")
    )


def _unknown_statement(site: ErrorSite) -> SyntaxMistake | None:
    """A word between statements that starts none."""
    from difflib import get_close_matches

    token, span = site.token, site.span(site.token)
    if site.owner:
        return None
    close = get_close_matches(token.lower(), HEADS, n=1, cutoff=0.7)
    if token in ("import", "from", "include"):
        close = ["use"]
    if close and site.following.type != "EQUAL":
        help = f"did you mean `{close[0]}`?"
    elif site.previous.type == "RPAR" and site.following.type == "COLON":
        help = "arguments stand inside the parentheses"
    elif site.following.type == "EQUAL":
        help = "steps stand inside `pipeline NAME(MODEL) { ... }`; models are declared with `model`"
    else:
        help = "a statement starts with " + ", ".join(f"`{h}`" for h in HEADS[:-1]) + f" or `{HEADS[-1]}`"
    return SyntaxMistake(syntax(f"`{token_label(token)}` starts no statement", span, help=help))


Row = tuple[frozenset | None, frozenset, Callable[[ErrorSite], SyntaxMistake | None]]


def _row(types: str, expected: str, rule) -> Row:
    return frozenset(types.split()) or None, frozenset(expected.split()), rule


#    found                         wanted       what is said
TABLE: tuple[Row, ...] = (
    _row("", "", _too_deep),
    _row("OPEN_STRING OPEN_LONG_STRING", "", open_string),
    _row("", "", _unclosed),
    _row("RPAR RSQB RBRACE", "", _unopened),
    _row("", "", bare_text),
    _row("QUOTED", "STRING", quoted),
    _row("QUOTED STRANGE FOREIGN", "", unknown_token),
    _row("NAME", "NUMBER", _python_word),
    _row("EQUAL COMPARE", "COLON", _equal_for_colon),
    _row("COLON COMPARE", "EQUAL", _colon_for_equal),
    _row("COLON", "COMMA", _ratio_of_zeros),
    _row("EQUAL", "COMPARE", _equal_for_compare),
    _row("NAME DOTTED NUMBER STRING LONG_STRING LSQB", "COMMA", _missing_comma),
    _row("NAME", "", spaced_unit_mistake),
    _row("", "COLON", _late_unit),
    _row("", "COMPARE", _late_unit),
    _row("COMMA", "RBRACE", _needless_comma),
    _row("COMMA", "$END", _needless_comma),
    _row("STAR", "STRING", _pattern),
    _row("STRING", "NAME", _quoted_name),
    _row("COMMA RBRACE", "COLON", _unquoted_braces),
    _row("MINUS", "STRING", _yaml_list),
    _row("NUMBER", "NAME", _misplaced_factor),
    _row("NAME DOTTED NUMBER STRING LONG_STRING", "$END", _unknown_statement),
)

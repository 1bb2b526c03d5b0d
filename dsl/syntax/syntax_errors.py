"""Diagnostics of syntax errors.

`TABLE` is keyed by the token found and the terminals that would fit, never by how the parser got there: the
same slip is told the same way wherever it stands. Rows are tried in order; the first that answers wins.
"""

from collections.abc import Callable

from .diagnostics import Fix
from .edition import DEPTH, HEADS
from .error_site import CLOSERS, OPENERS, ErrorSite
from .expected import ITEMS, SHARES, token_label, unexpected_token_mistake
from .source import Span
from .syntax_error import (
    SyntaxMistake,
    foreign_spelling,
    is_unit,
    join_unit_mistake,
    missing_comma,
    not_closed,
    not_opened,
    remove_text_mistake,
    replace_token_mistake,
    spaced_unit_mistake,
    syntax,
    too_deep,
    unexpected_sign,
)
from .unknown_tokens import (
    single_quotes_mistake,
    unknown_token_mistake,
    unquoted_text_mistake,
    unterminated_string_mistake,
)

WORDS = {"True": "true", "False": "false"}


def diagnose_syntax_mistake(error_site: ErrorSite) -> SyntaxMistake:
    for types, expected, rule in TABLE:
        if (types is None or error_site.token.type in types) and expected <= error_site.expected:
            mistake = rule(error_site)
            if mistake is not None:
                return mistake
    return unexpected_token_mistake(error_site)


# Brackets


def _unclosed_bracket_mistake(error_site: ErrorSite) -> SyntaxMistake | None:
    token, open = error_site.token, error_site.open_brackets
    if not open:
        return None
    opener = error_site.tokens[open[-1]]
    at_end = (
        token.type == "$END"
        or error_site.begins_statement(error_site.at)
        or (error_site.innermost_bracket and error_site.at > error_site.start and error_site.begins_step(error_site.at))
    )
    crossed = (
        token.type in CLOSERS
        and opener.type != CLOSERS[token.type]
        and any(error_site.tokens[i].type == CLOSERS[token.type] for i in open)
    )
    if not (at_end or crossed):
        return None
    closer = OPENERS[opener.type]
    where = "the file ends here" if token.type == "$END" else f"`{closer}` is expected before this"
    return SyntaxMistake(
        not_closed(
            f"`{opener}` is not closed",
            error_site.span(token),
            label=where,
            related=((error_site.span(opener), "opened here"),),
            help=f"add `{closer}`",
        )
    )


def _unopened_bracket_mistake(error_site: ErrorSite) -> SyntaxMistake | None:
    if any(error_site.tokens[i].type == CLOSERS[error_site.token.type] for i in error_site.open_brackets):
        return None
    return SyntaxMistake(
        not_opened(
            f"`{error_site.token}` closes nothing",
            error_site.span(error_site.token),
            help="remove it, or open it earlier",
        )
    )


def _nesting_depth_mistake(error_site: ErrorSite) -> SyntaxMistake | None:
    return (
        SyntaxMistake(
            too_deep(
                f"parentheses and brackets are nested more than {DEPTH} deep",
                error_site.span(error_site.token),
                help="split the list, or name parts of it",
            )
        )
        if error_site.deep
        else None
    )


# Signs and commas


def _equal_for_colon_mistake(error_site: ErrorSite) -> SyntaxMistake:
    name = error_site.previous
    if error_site.statement_keyword == "param":
        return SyntaxMistake(
            syntax(f"`{name}` has no type", error_site.span(name), help=f"write its type: `param {name}: ratio = ...`")
        )
    return replace_token_mistake(
        error_site,
        "COLON",
        ":",
        f"`{error_site.token}` stands where `:` is meant",
        f"arguments and entries are written `{name}: value`",
    )


def _colon_for_equal_mistake(error_site: ErrorSite) -> SyntaxMistake:
    return replace_token_mistake(
        error_site,
        "EQUAL",
        "=",
        f"`{error_site.token}` stands where `=` is meant",
        "declarations and steps are written `name = word(...)`",
    )


def _equal_for_compare_mistake(error_site: ErrorSite) -> SyntaxMistake:
    return replace_token_mistake(
        error_site, "COMPARE", "==", "`=` compares nothing", "write `<=`, `>=` or `==`", sure=False
    )


def _missing_comma_mistake(error_site: ErrorSite) -> SyntaxMistake | None:
    if not error_site.innermost_bracket:
        return None
    unit = spaced_unit_mistake(error_site)
    if unit:
        return unit
    if error_site.token in ("off", "fo", "to", "out") and error_site.following.type == "NAME":
        return SyntaxMistake(
            syntax(
                f"`{error_site.token}` stands where `of` is expected",
                error_site.span(error_site.token),
                help="a share is written `85% of channels`",
            )
        )
    end = error_site.previous.end_pos
    gap = Span(error_site.source, end, end)
    if error_site.previous.type == "NAME" and "COLON" in error_site.expected and error_site.following.type != "COLON":
        return SyntaxMistake(
            unexpected_sign(
                f"a `:` is missing after `{error_site.previous}`",
                error_site.span(error_site.token),
                help=f"arguments and entries are written `{error_site.previous}: value`",
                fix=Fix(gap, ":"),
            ),
            True,
            ("COLON", ":"),
        )
    return SyntaxMistake(
        missing_comma(
            f"a comma is missing before `{token_label(error_site.token)}`",
            error_site.span(error_site.token),
            help="arguments, items and shares are separated by `,`",
            fix=Fix(gap, ","),
        ),
        True,
        ("COMMA", ","),
    )


def _spaced_unit_in_block_mistake(error_site: ErrorSite) -> SyntaxMistake | None:
    """In a block, `24 GiB` looks like an entry named GiB until the next token."""
    if error_site.at != error_site.start + 1 or error_site.start < 2:
        return None
    number, unit = error_site.tokens[error_site.start - 1], error_site.tokens[error_site.start]
    if number.type != "NUMBER" or number.line != unit.line or not is_unit(unit):
        return None
    return join_unit_mistake(error_site, number, unit, repairs=False)


def _needless_comma_mistake(error_site: ErrorSite) -> SyntaxMistake | None:
    if error_site.innermost_bracket:
        return None
    item = ITEMS.get(error_site.statement_keyword, ("", ""))[0].split(" ")[-1] or "statement"
    return remove_text_mistake(
        error_site,
        error_site.span(error_site.token),
        unexpected_sign,
        f"no comma stands between {_pluralize(item)}",
        "spaces or new lines are enough",
    )


def _pluralize(item: str) -> str:
    return item[:-1] + "ies" if item.endswith("y") else item + "s"


# Words


def _python_word_mistake(error_site: ErrorSite) -> SyntaxMistake | None:
    token = error_site.token
    if token in WORDS:
        return replace_token_mistake(
            error_site,
            WORDS[token].upper(),
            WORDS[token],
            f"`{token}` is written `{WORDS[token]}`",
            f"write `{WORDS[token]}`",
            foreign_spelling,
        )
    if token == "None":
        return SyntaxMistake(
            foreign_spelling("there is no `None`", error_site.span(token), help="leave the argument out")
        )
    return None


def _unquoted_pattern_mistake(error_site: ErrorSite) -> SyntaxMistake | None:
    """`pattern: 2:4`, which is a text."""
    before, after = error_site.previous, error_site.following
    if before.type != "NUMBER" or after.type != "NUMBER" or before.end_pos != error_site.token.start_pos:
        return None
    both = Span(error_site.source, before.start_pos, after.end_pos)
    quoted = f'"{both.text}"'
    return SyntaxMistake(
        unexpected_sign(f"`{both.text}` is written in quotes", both, help=f"write `{quoted}`", fix=Fix(both, quoted))
    )


def _pattern_mistake(error_site: ErrorSite) -> SyntaxMistake:
    return SyntaxMistake(
        syntax(
            "a pattern stands outside quotes", error_site.span(error_site.token), help='write it in quotes: `"*.mlp"`'
        )
    )


def _quoted_share_name_mistake(error_site: ErrorSite) -> SyntaxMistake | None:
    """`{"blocks": 44}`, as in JSON."""
    text = error_site.token[1:-1]
    if error_site.innermost_bracket != "LBRACE" or not text.isidentifier() or not text.isascii():
        return None
    return replace_token_mistake(
        error_site, "NAME", text, "names of shares stand without quotes", f"write `{text}`", foreign_spelling
    )


def _unquoted_braces_mistake(error_site: ErrorSite) -> SyntaxMistake | None:
    """`{q,k}_proj`, whose braces look like shares."""
    if error_site.innermost_bracket != "LBRACE" or error_site.tokens[error_site.at - 2].type not in ("LBRACE", "COMMA"):
        return None
    return SyntaxMistake(
        syntax(
            f"`{token_label(error_site.previous)}` has no share",
            error_site.span(error_site.previous),
            help=f"shares are written `{SHARES}`, lists `[a, b]`, patterns in quotes",
        )
    )


def _yaml_list_mistake(error_site: ErrorSite) -> SyntaxMistake:
    return SyntaxMistake(
        foreign_spelling("`-` starts no list", error_site.span(error_site.token), help="lists are written `[a, b]`")
    )


def _factor_before_baseline_mistake(error_site: ErrorSite) -> SyntaxMistake | None:
    if error_site.previous.type != "STAR":
        return None
    factor = error_site.tokens[error_site.at - 2]
    return SyntaxMistake(
        syntax(
            "the factor stands before the baseline",
            error_site.span(error_site.token),
            help=f"write `{error_site.token} * {factor}`",
        )
    )


def _unknown_statement_mistake(error_site: ErrorSite) -> SyntaxMistake | None:
    """A word between statements that starts none."""
    from difflib import get_close_matches

    token, span = error_site.token, error_site.span(error_site.token)
    if error_site.statement_keyword:
        return None
    close = get_close_matches(token.lower(), HEADS, n=1, cutoff=0.7)
    if token in ("import", "from", "include"):
        close = ["use"]
    if close and error_site.following.type != "EQUAL":
        help = f"did you mean `{close[0]}`?"
    elif error_site.previous.type == "RPAR" and error_site.following.type == "COLON":
        help = "arguments stand inside the parentheses"
    elif error_site.following.type == "EQUAL":
        help = "steps stand inside `pipeline NAME(MODEL) { ... }`; models are declared with `model`"
    else:
        help = "a statement starts with " + ", ".join(f"`{h}`" for h in HEADS[:-1]) + f" or `{HEADS[-1]}`"
    return SyntaxMistake(syntax(f"`{token_label(token)}` starts no statement", span, help=help))


Row = tuple[frozenset | None, frozenset, Callable[[ErrorSite], SyntaxMistake | None]]


def _rule_row(types: str, expected: str, rule) -> Row:
    return frozenset(types.split()) or None, frozenset(expected.split()), rule


#    found                         wanted       what is said
TABLE: tuple[Row, ...] = (
    _rule_row("", "", _nesting_depth_mistake),
    _rule_row("OPEN_STRING OPEN_LONG_STRING", "", unterminated_string_mistake),
    _rule_row("", "", _unclosed_bracket_mistake),
    _rule_row("RPAR RSQB RBRACE", "", _unopened_bracket_mistake),
    _rule_row("", "", unquoted_text_mistake),
    _rule_row("QUOTED", "STRING", single_quotes_mistake),
    _rule_row("QUOTED STRANGE FOREIGN", "", unknown_token_mistake),
    _rule_row("NAME", "NUMBER", _python_word_mistake),
    _rule_row("EQUAL COMPARE", "COLON", _equal_for_colon_mistake),
    _rule_row("COLON COMPARE", "EQUAL", _colon_for_equal_mistake),
    _rule_row("COLON", "COMMA", _unquoted_pattern_mistake),
    _rule_row("EQUAL", "COMPARE", _equal_for_compare_mistake),
    _rule_row("NAME DOTTED NUMBER STRING LONG_STRING LSQB", "COMMA", _missing_comma_mistake),
    _rule_row("NAME", "", spaced_unit_mistake),
    _rule_row("", "COLON", _spaced_unit_in_block_mistake),
    _rule_row("", "COMPARE", _spaced_unit_in_block_mistake),
    _rule_row("COMMA", "RBRACE", _needless_comma_mistake),
    _rule_row("COMMA", "$END", _needless_comma_mistake),
    _rule_row("STAR", "STRING", _pattern_mistake),
    _rule_row("STRING", "NAME", _quoted_share_name_mistake),
    _rule_row("COMMA RBRACE", "COLON", _unquoted_braces_mistake),
    _rule_row("MINUS", "STRING", _yaml_list_mistake),
    _rule_row("NUMBER", "NAME", _factor_before_baseline_mistake),
    _rule_row("NAME DOTTED NUMBER STRING LONG_STRING", "$END", _unknown_statement_mistake),
)

"""Diagnostics of unknown tokens: broken strings, characters without a meaning."""

import re

from .diagnostics import Fix
from .error_site import ErrorSite
from .quotes import missing_quotes_diagnostic
from .source import Span
from .syntax_error import (
    SyntaxMistake,
    foreign_spelling,
    remove_text_mistake,
    replace_token_mistake,
    spaced_unit_mistake,
    syntax,
    unknown_character,
    unterminated_string,
)


def unterminated_string_mistake(error_site: ErrorSite) -> SyntaxMistake:
    span = error_site.span(error_site.token)
    long = error_site.token.type == "OPEN_LONG_STRING"
    quote = '"""' if long else '"'
    return SyntaxMistake(
        unterminated_string(
            f"the string that starts here has no closing `{quote}`",
            Span(span.source, span.start, span.start + len(quote)) if long else span,
            help=f"end it with `{quote}`" + ("" if long else '; text of several lines stands between `"""`'),
        )
    )


_bare = re.compile(r"[\w./~*?-]+")  # what paths and patterns are made of


def unquoted_text_mistake(error_site: ErrorSite) -> SyntaxMistake | None:
    """A path or a pattern among arguments, without its quotes: `hf(./m)`, `text(a/b.txt)`, `native(nat-2)`."""
    if error_site.innermost_bracket != "LPAR":
        return None
    at = error_site.token.start_pos
    match = next((m for m in _bare.finditer(error_site.source.text) if m.start() <= at < m.end()), None)
    if match is None or not re.search(r"[^\W\d]", match[0]) or match[0].startswith(("//", "/*")):
        return None
    glued = error_site.token.type == "NUMBER" and error_site.previous.type in ("NAME", "DOTTED")
    if not (re.search("[/~*?]", match[0]) or (glued and match.start() < at)):
        return None
    return SyntaxMistake(missing_quotes_diagnostic(match[0], Span(error_site.source, match.start(), match.end())))


def single_quotes_mistake(error_site: ErrorSite) -> SyntaxMistake:
    text = '"' + error_site.token[1:-1].replace("\\'", "'").replace('"', '\\"') + '"'
    return replace_token_mistake(
        error_site, "STRING", text, "strings stand in double quotes", f"write `{text}`", foreign_spelling
    )


def unknown_token_mistake(error_site: ErrorSite) -> SyntaxMistake | None:
    token, span = error_site.token, error_site.span(error_site.token)
    if token == ";" and error_site.innermost_bracket and "COMMA" in error_site.expected:
        help = "arguments, items and shares are separated by `,`"
        return replace_token_mistake(error_site, "COMMA", ",", "`;` stands where `,` is meant", help, foreign_spelling)
    if token == ";" and error_site.expected & {"RBRACE", "$END"}:
        return remove_text_mistake(
            error_site, span, foreign_spelling, "`;` has no meaning here", "statements and steps need no separator"
        )
    if token == "%" and error_site.previous.type == "NUMBER" and error_site.previous.end_line == token.line:
        return spaced_unit_mistake(error_site)
    if (
        token == "."
        and error_site.previous.type in ("NAME", "DOTTED")
        and error_site.previous.end_pos == token.start_pos
    ):
        return SyntaxMistake(
            syntax(
                f"`{error_site.previous}.` ends in a dot",
                error_site.span(error_site.previous).to(span),
                help="a dotted name goes on after the dot: `prune.blocks`",
            )
        )
    if token in CHARACTERS:
        fault = unknown_character if token.type == "STRANGE" else foreign_spelling
        return SyntaxMistake(fault(f"`{token}` has no meaning here", span, help=CHARACTERS[token]))
    first = Span(span.source, span.start, span.start + 1)
    if token.isspace() or not token.isprintable():
        message = f"the character U+{ord(token[0]):04X} has no meaning outside strings"
        if token.isspace():
            return SyntaxMistake(
                unknown_character(message, first, help="a plain space is meant", fix=Fix(span, " ")), True, None, True
            )
        return SyntaxMistake(unknown_character(message, first))
    error_span = span if token.isascii() else Span(span.source, span.start, span.start + len(token))
    return SyntaxMistake(
        unknown_character(
            f"`{token}` has no meaning outside strings",
            error_span,
            help="" if token.isascii() else "names are made of a-z, A-Z, 0-9 and `_`",
        )
    )


CHARACTERS = {
    "//": "comments start with `#`",
    "/*": "comments start with `#`, on every line",
    "*/": "comments start with `#`",
    "---": "a file holds one recipe and needs no separator",
    "!=": "bounds compare with `<=`, `<`, `>=`, `>` or `==`",
    "=>": "bounds compare with `>=`",
    ":=": "a step is written `name = pass(...)`",
    "->": "steps work in the order they are written; another source is given as `from: name`",
    "&&": "selectors are intersected with `&`",
    "||": "selectors are united with `|`",
    "**": "patterns stand in quotes",
    ".": "a decimal starts with a digit, and a range is written `1..2`",
    "...": "a range is written `1..2`",
    "/": "paths and patterns stand in quotes",
    "\\": "strings stand in double quotes",
    "'": "strings stand in double quotes",
    "`": "strings stand in double quotes",
    "?": "patterns stand in quotes",
    "!": "there is no negation; selectors subtract with `-`",
    "@": "passes are called by name: `step = prune.blocks(remove: 4)`",
    "~": "paths and patterns stand in quotes",
    "$": "parameters are used by name: `keep: keep of channels`",
    "+": "selectors are united with `|`",
    "%": "a percentage is a number followed by `%`: `85%`",
    ";": "statements and steps need no separator",
    "^": "patterns are globs, in quotes",
}

"""Tokens that the grammar expects at a position, in words."""

from .edition import HEADS
from .error_site import ErrorSite
from .syntax_error import SyntaxMistake, syntax

# How a statement or item is written, by the keyword it belongs to.
FORMS = {
    "use": "use std.text",
    "param": "param keep: ratio = 85% in 60%..100%",
    "model": 'model base = hf("org/name")',
    "data": 'data calib = text("calib.txt")',
    "profile": "profile zen4 { isa: avx512_bf16  threads: 2 }",
    "matrix": "matrix keep: [80%, 85%]",
    "pipeline": "pipeline lean(base) { ... }",
    "expect": "expect lean { ... }",
    "emit": "emit lean { ... }",
}
ITEMS = {
    "profile": ("an entry", "threads: 2"),
    "matrix": ("an entry", "keep: [80%, 85%]"),
    "pipeline": ("a step", "slim = prune.blocks(remove: 4)"),
    "expect": ("a bound", "perplexity(heldout) <= 1.15 * base"),
    "emit": ("a target", 'hf("out")'),
}
SIGNS = {
    "EQUAL": "`=`",
    "COLON": "`:`",
    "COMMA": "`,`",
    "LPAR": "`(`",
    "RPAR": "`)`",
    "LBRACE": "`{`",
    "RBRACE": "`}`",
    "LSQB": "`[`",
    "RSQB": "`]`",
    "NAME": "a name",
    "COMPARE": "`<=`",
    "NUMBER": "a number",
    "STRING": "a string",
    "TO": "`..`",
    "STAR": "`*`",
    "IN": "`in`",
    "ON": "`on`",
    "WITH": "`with`",
    "CONFIDENCE": "`confidence`",
    "AS": "`as`",
    "EMPTY": "`empty`",
    "OF": "`of`",
    "UNION": "`|`",
}
VALUE = {"NUMBER", "STRING", "LONG_STRING", "LSQB", "LBRACE", "TRUE", "FALSE"}
SHARES = "{blocks: 3, channels: 1}"
STARTS = VALUE | {"NAME", "DOTTED"}


def unexpected_token_mistake(error_site: ErrorSite) -> SyntaxMistake:
    token, expected = error_site.token, _expected_phrase(error_site)
    span = error_site.span(token)
    if token.type == "$END":
        message = f"the file ends where {expected} is expected"
    elif error_site.at > error_site.start and error_site.is_first_on_line(error_site.at):
        message, span = (
            f"{expected} is expected after `{token_label(error_site.previous)}`",
            error_site.span(error_site.previous),
        )
    else:
        message = f"`{token_label(token)}` stands where {expected} is expected"
    form = (
        FORMS.get(error_site.statement_keyword, "")
        if error_site.block is None
        else ITEMS[error_site.statement_keyword][1]
    )
    form = SHARES if error_site.innermost_bracket == "LBRACE" else form
    return SyntaxMistake(syntax(message, span, help=f"write it like `{form}`" if form else ""))


def _expected_phrase(error_site: ErrorSite) -> str:
    terminals, names = set(error_site.expected), []
    if terminals == {"NAME", "DOTTED"} and error_site.previous.type == "EQUAL":
        return "a call"
    if len(error_site.expected & {head.upper() for head in HEADS}) > 1:
        return "a statement"
    if error_site.block is not None and not error_site.innermost_bracket and {"RBRACE", "NAME"} <= terminals:
        names.append(ITEMS[error_site.statement_keyword][0])
        terminals -= {"NAME"}
    elif len(terminals & VALUE) > 2:
        names.append("a value")
        terminals -= STARTS | {"LPAR"}
    closing = terminals & {"COMMA", "RPAR", "RSQB", "RBRACE"}
    if closing:
        terminals -= {"UNION", "TO", "OF", "STAR", "ON", "WITH"}
    names += [sign for kind, sign in SIGNS.items() if kind in terminals]
    names = names[:3] or ["something else"]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]


def token_label(token) -> str:
    text = token.split("\n")[0].strip()
    return text if len(text) <= 30 else text[:29] + "…"

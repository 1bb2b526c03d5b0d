"""What a syntax error is said to be.

`TABLE` is keyed by the token found and the terminals that would have fitted, never by how the parser got there:
the same slip is told the same way wherever it stands. Rows are tried in order; the first that answers wins.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from .diagnostics import Diagnostic, Fault, Fix
from .parse import DEPTH, HEADS
from .scene import CLOSERS, OPENERS, Scene
from .source import Span

syntax = Fault("syntax", "The text does not follow the grammar of the language.")
not_closed = Fault("not-closed", "A parenthesis, bracket or brace is opened and never closed.")
not_opened = Fault("not-opened", "A parenthesis, bracket or brace is closed that was never opened.")
missing_comma = Fault("missing-comma", "Two arguments or items stand side by side without a comma.")
wrong_sign = Fault("wrong-sign", "A sign such as `=` stands where another one, such as `:`, is meant.")
foreign_spelling = Fault("foreign-spelling", "Something is written as in Python, YAML, JSON or C.")
unknown_character = Fault("unknown-character", "A character has no meaning outside strings and comments.")
unterminated_string = Fault("unterminated-string", "A string is not closed on its line, or a docstring not at all.")
too_deep = Fault("too-deep", "Parentheses and brackets are nested deeper than any recipe needs.")

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
SIGNS = {"EQUAL": "`=`", "COLON": "`:`", "COMMA": "`,`", "LPAR": "`(`", "RPAR": "`)`", "LBRACE": "`{`", "RBRACE": "`}`",
         "LSQB": "`[`", "RSQB": "`]`", "NAME": "a name", "COMPARE": "`<=`", "NUMBER": "a number", "STRING": "a string",
         "TO": "`..`", "STAR": "`*`", "IN": "`in`", "ON": "`on`", "AS": "`as`", "EMPTY": "`empty`", "OF": "`of`",
         "UNION": "`|`"}
VALUE = {"NUMBER", "STRING", "LONG_STRING", "LSQB", "TRUE", "FALSE"}
STARTS = VALUE | {"NAME", "DOTTED"}
WORDS = {"True": "true", "False": "false"}
_unit = re.compile(r"%|[num]?s|min|h|d|[KMGT]i?B?|B")


@dataclass(frozen=True)
class Slip:
    """`repairs`: parsing can go on, after feeding `put`, and without the token found if `skip`."""

    diagnostic: Diagnostic
    repairs: bool = False
    put: tuple[str, str] | None = None
    skip: bool = False

    @property
    def drops(self) -> bool:
        return self.repairs and self.skip and not self.put


def diagnose(scene: Scene) -> Slip:
    for found, wanted, say in TABLE:
        if (found is None or scene.found.type in found) and wanted <= scene.wanted:
            slip = say(scene)
            if slip is not None:
                return slip
    return _unexpected(scene)


def _replace(scene: Scene, kind: str, text: str, message: str, help: str, fault: Fault = wrong_sign,
             sure: bool = True) -> Slip:
    span, around = scene.span(scene.found), scene.source.text
    before = " " if kind == "EQUAL" and not around[span.start - 1].isspace() else ""
    after = " " if kind in ("EQUAL", "COLON") and not around[span.end : span.end + 1].isspace() else ""
    fix = Fix(span, before + text + after) if sure else None
    return Slip(fault(message, span, help=help, fix=fix), True, (kind, text), True)


def _drop(scene: Scene, span: Span, fault: Fault, message: str, help: str) -> Slip:
    return Slip(fault(message, span, help=help, fix=Fix(span, "")), True, None, True)


# Strings and characters

def _open_string(scene: Scene) -> Slip:
    span = scene.span(scene.found)
    long = scene.found.type == "OPEN_LONG_STRING"
    quote = '"""' if long else '"'
    return Slip(unterminated_string(
        f"the string that starts here has no closing `{quote}`", Span(span.source, span.start, span.start + len(quote))
        if long else span, help=f"end it with `{quote}`" + ("" if long else "; text of several lines stands between `\"\"\"`")))


def _quoted(scene: Scene) -> Slip:
    text = '"' + scene.found[1:-1].replace("\\'", "'").replace('"', '\\"') + '"'
    return _replace(scene, "STRING", text, "strings stand in double quotes", f"write `{text}`", foreign_spelling)


def _strange(scene: Scene) -> Slip:
    found, span = scene.found, scene.span(scene.found)
    if found == ";" and scene.wanted & {"RBRACE", "$END"}:
        return _drop(scene, span, foreign_spelling, "`;` has no meaning here", "statements and steps need no separator")
    if found == "%" and scene.previous.type == "NUMBER" and scene.previous.end_line == found.line:
        return _spaced_unit(scene)
    if found == "." and scene.previous.type in ("NAME", "DOTTED") and scene.previous.end_pos == found.start_pos:
        return Slip(syntax(f"`{scene.previous}.` ends in a dot", scene.span(scene.previous).to(span),
                           help="a dotted name goes on after the dot: `prune.blocks`"))
    if found in CHARACTERS:
        fault = unknown_character if found.type == "STRANGE" else foreign_spelling
        return Slip(fault(f"`{found}` has no meaning here", span, help=CHARACTERS[found]))
    first = Span(span.source, span.start, span.start + 1)
    if found.isspace() or not found.isprintable():
        message = f"the character U+{ord(found[0]):04X} has no meaning outside strings"
        if found.isspace():
            return Slip(unknown_character(message, first, help="a plain space is meant", fix=Fix(span, " ")), True, None, True)
        return Slip(unknown_character(message, first))
    shown = span if found.isascii() else Span(span.source, span.start, span.start + len(found))
    return Slip(unknown_character(f"`{found}` has no meaning outside strings", shown,
                                  help="" if found.isascii() else "names are made of a-z, A-Z, 0-9 and `_`"))


CHARACTERS = {
    "//": "comments start with `#`", "/*": "comments start with `#`, on every line", "*/": "comments start with `#`",
    "---": "a file holds one recipe and needs no separator", "!=": "bounds compare with `<=`, `<`, `>=`, `>` or `==`",
    "=>": "bounds compare with `>=`", ":=": "a step is written `name = pass(...)`",
    "->": "steps work in the order they are written; another source is given as `from: name`",
    "&&": "selectors are intersected with `&`", "||": "selectors are united with `|`", "**": "patterns stand in quotes",
    ".": "a decimal starts with a digit, and a range is written `1..2`", "...": "a range is written `1..2`",
    "/": "paths and patterns stand in quotes", "\\": "strings stand in double quotes", "'": "strings stand in double quotes",
    "`": "strings stand in double quotes", "?": "patterns stand in quotes", "!": "there is no negation; selectors subtract with `-`",
    "@": "passes are called by name: `step = prune.blocks(remove: 4)`", "~": "paths and patterns stand in quotes",
    "$": "parameters are used by name: `keep: keep of channels`", "+": "selectors are united with `|`",
    "%": "a percent sign follows its number without a space: `85%`", ";": "statements and steps need no separator",
    "^": "patterns are globs, in quotes",
}


# Brackets

def _unclosed(scene: Scene) -> Slip | None:
    found, open = scene.found, scene.open
    ends = found.type == "$END" or scene.is_head(scene.at) or scene.at > scene.start and scene.is_step(scene.at)
    crossed = found.type in CLOSERS and open and scene.tokens[open[-1]].type != CLOSERS[found.type] and any(
        scene.tokens[i].type == CLOSERS[found.type] for i in open)
    if not open or not (ends or crossed):
        return None
    opener = scene.tokens[open[-1]]
    closer = OPENERS[opener.type]
    where = "the file ends here" if found.type == "$END" else f"`{closer}` is expected before this"
    return Slip(not_closed(f"`{opener}` is not closed", scene.span(found), label=where,
                           related=((scene.span(opener), "opened here"),), help=f"add `{closer}`"))


def _unopened(scene: Scene) -> Slip | None:
    if any(scene.tokens[i].type == CLOSERS[scene.found.type] for i in scene.open):
        return None
    return Slip(not_opened(f"`{scene.found}` closes nothing", scene.span(scene.found), help="remove it, or open it earlier"))


def _too_deep(scene: Scene) -> Slip | None:
    return Slip(too_deep(f"parentheses and brackets are nested more than {DEPTH} deep", scene.span(scene.found),
                         help="split the list, or name parts of it")) if scene.deep else None


# Signs and commas

def _equal_for_colon(scene: Scene) -> Slip:
    name = scene.previous
    if scene.owner == "param":
        return Slip(syntax(f"`{name}` has no type", scene.span(name), help=f"write its type: `param {name}: ratio = ...`"))
    return _replace(scene, "COLON", ":", f"`{scene.found}` stands where `:` is meant",
                    f"arguments and entries are written `{name}: value`")


def _colon_for_equal(scene: Scene) -> Slip:
    return _replace(scene, "EQUAL", "=", f"`{scene.found}` stands where `=` is meant",
                    "declarations and steps are written `name = word(...)`")


def _equal_for_compare(scene: Scene) -> Slip:
    return _replace(scene, "COMPARE", "==", "`=` compares nothing", "write `<=`, `>=` or `==`", sure=False)


def _comma(scene: Scene) -> Slip | None:
    if not scene.open or scene.tokens[scene.open[-1]].type == "LBRACE":
        return None
    if _unit_apart(scene):
        return _spaced_unit(scene)
    if scene.found in ("off", "fo", "to", "out") and scene.following.type == "NAME":
        return Slip(syntax(f"`{scene.found}` stands where `of` is expected", scene.span(scene.found),
                           help="a share is written `85% of channels`"))
    end = scene.previous.end_pos
    gap = Span(scene.source, end, end)
    return Slip(missing_comma(f"a comma is missing before `{_shown(scene.found)}`", scene.span(scene.found),
                              help="arguments and items are separated by `,`", fix=Fix(gap, ",")), True, ("COMMA", ","))


def _unit_apart(scene: Scene) -> bool:
    number, unit = scene.previous, scene.found
    return (number.type == "NUMBER" and number[-1].isdigit() and unit.type in ("NAME", "STRANGE") and number.line == unit.line
            and bool(_unit.fullmatch(unit)) and scene.following.type not in ("COLON", "EQUAL"))


def _spaced_unit(scene: Scene) -> Slip | None:
    if not _unit_apart(scene):
        return None
    number, unit = scene.previous, scene.found
    gap = Span(scene.source, number.end_pos, unit.start_pos)
    return Slip(wrong_sign("a unit follows its number without a space", Span(scene.source, number.start_pos, unit.end_pos),
                           help=f"write `{number}{unit}`", fix=Fix(gap, "")), True, None, True)


def _late_unit(scene: Scene) -> Slip | None:
    """In a block, `24 GiB` looks like an entry named GiB until the next token."""
    if scene.at != scene.start + 1 or scene.start < 2:
        return None
    number, unit = scene.tokens[scene.start - 1], scene.tokens[scene.start]
    if number.type != "NUMBER" or number.line != unit.line or not _unit.fullmatch(unit):
        return None
    gap = Span(scene.source, number.end_pos, unit.start_pos)
    return Slip(wrong_sign("a unit follows its number without a space", Span(scene.source, number.start_pos, unit.end_pos),
                           help=f"write `{number}{unit}`", fix=Fix(gap, "")))


def _needless_comma(scene: Scene) -> Slip | None:
    if scene.open and scene.tokens[scene.open[-1]].type != "LBRACE":
        return None
    item = ITEMS.get(scene.owner, ("", ""))[0].split(" ")[-1] or "statement"
    return _drop(scene, scene.span(scene.found), wrong_sign, f"no comma stands between {_plural(item)}",
                 "spaces or new lines are enough")


def _plural(item: str) -> str:
    return item[:-1] + "ies" if item.endswith("y") else item + "s"


# Words

def _python_word(scene: Scene) -> Slip | None:
    found = scene.found
    if found in WORDS:
        return _replace(scene, WORDS[found].upper(), WORDS[found], f"`{found}` is written `{WORDS[found]}`",
                        f"write `{WORDS[found]}`", foreign_spelling)
    if found == "None":
        return Slip(foreign_spelling("there is no `None`", scene.span(found), help="leave the argument out"))
    return None


def _pattern(scene: Scene) -> Slip:
    return Slip(syntax("a pattern stands outside quotes", scene.span(scene.found), help='write it in quotes: `"*.mlp"`'))


def _mapping(scene: Scene) -> Slip:
    return Slip(foreign_spelling("no value starts with `{`", scene.span(scene.found),
                                 help="lists are written `[a, b]`, patterns in quotes"))


def _yaml_list(scene: Scene) -> Slip:
    return Slip(foreign_spelling("`-` starts no list", scene.span(scene.found), help="lists are written `[a, b]`"))


def _factor(scene: Scene) -> Slip | None:
    if scene.previous.type != "STAR":
        return None
    base = scene.tokens[scene.at - 2]
    return Slip(syntax("the factor stands before the baseline", scene.span(scene.found),
                       help=f"write `{scene.found} * {base}`"))


def _statement(scene: Scene) -> Slip | None:
    """A word between statements that starts none."""
    from difflib import get_close_matches

    found, span = scene.found, scene.span(scene.found)
    if scene.owner:
        return None
    close = get_close_matches(found.lower(), HEADS, n=1, cutoff=0.7)
    if found in ("import", "from", "include"):
        close = ["use"]
    if close and scene.following.type != "EQUAL":
        help = f"did you mean `{close[0]}`?"
    elif scene.previous.type == "RPAR" and scene.following.type == "COLON":
        help = "arguments stand inside the parentheses"
    elif scene.following.type == "EQUAL":
        help = "steps stand inside `pipeline NAME(MODEL) { ... }`; models and data are declared with `model` and `data`"
    else:
        help = "a statement starts with " + ", ".join(f"`{h}`" for h in HEADS[:-1]) + f" or `{HEADS[-1]}`"
    return Slip(syntax(f"`{_shown(found)}` starts no statement", span, help=help))


# What no row of the table knows

def _unexpected(scene: Scene) -> Slip:
    found, expected = scene.found, _expected(scene)
    span = scene.span(found)
    if found.type == "$END":
        message = f"the file ends where {expected} is expected"
    elif scene.at > scene.start and scene.first_on_line(scene.at):
        message, span = f"{expected} is expected after `{_shown(scene.previous)}`", scene.span(scene.previous)
    else:
        message = f"`{_shown(found)}` stands where {expected} is expected"
    form = FORMS.get(scene.owner, "") if scene.block is None else ITEMS[scene.owner][1]
    return Slip(syntax(message, span, help=f"write it like `{form}`" if form else ""))


def _expected(scene: Scene) -> str:
    wanted, names = set(scene.wanted), []
    if wanted == {"NAME", "DOTTED"} and scene.previous.type == "EQUAL":
        return "a call"
    if len(scene.wanted & {head.upper() for head in HEADS}) > 1:
        return "a statement"
    if scene.block is not None and {"RBRACE", "NAME"} <= wanted:
        names.append(ITEMS[scene.owner][0])
        wanted -= {"NAME"}
    elif len(wanted & VALUE) > 2:
        names.append("a value")
        wanted -= STARTS | {"LPAR"}
    closing = wanted & {"COMMA", "RPAR", "RSQB", "RBRACE"}
    if closing:
        wanted -= {"UNION", "TO", "OF", "STAR", "ON"}
    names += [sign for kind, sign in SIGNS.items() if kind in wanted]
    names = names[:3] or ["something else"]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]


def _shown(token) -> str:
    text = token.split("\n")[0].strip()
    return text if len(text) <= 30 else text[:29] + "…"


Row = tuple[frozenset | None, frozenset, Callable[[Scene], Slip | None]]


def _row(found: str, wanted: str, say) -> Row:
    return frozenset(found.split()) or None, frozenset(wanted.split()), say


#    found                         wanted       what is said
TABLE: tuple[Row, ...] = (
    _row("", "", _too_deep),
    _row("OPEN_STRING OPEN_LONG_STRING", "", _open_string),
    _row("", "", _unclosed),
    _row("RPAR RSQB RBRACE", "", _unopened),
    _row("QUOTED", "STRING", _quoted),
    _row("QUOTED STRANGE FOREIGN", "", _strange),
    _row("NAME", "NUMBER", _python_word),
    _row("EQUAL COMPARE", "COLON", _equal_for_colon),
    _row("COLON COMPARE", "EQUAL", _colon_for_equal),
    _row("EQUAL", "COMPARE", _equal_for_compare),
    _row("NAME DOTTED NUMBER STRING LONG_STRING LSQB", "COMMA", _comma),
    _row("NAME", "", _spaced_unit),
    _row("", "COLON", _late_unit),
    _row("", "COMPARE", _late_unit),
    _row("COMMA", "RBRACE", _needless_comma),
    _row("COMMA", "$END", _needless_comma),
    _row("STAR", "STRING", _pattern),
    _row("LBRACE", "STRING", _mapping),
    _row("MINUS", "STRING", _yaml_list),
    _row("NUMBER", "NAME", _factor),
    _row("NAME DOTTED NUMBER STRING LONG_STRING", "$END", _statement),
)

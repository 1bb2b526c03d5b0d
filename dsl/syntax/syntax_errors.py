"""Diagnostics of syntax errors.

`TABLE` is keyed by the token found and the terminals that would fit, never by how the parser got there: the
same slip is told the same way wherever it stands. Rows are tried in order; the first that answers wins.
"""

from collections.abc import Callable

from .diagnostics import Fix
from .edition import DEPTH, HEADS
from .error_site import CLOSERS, OPENERS, Scene
from .expected import ITEMS, SHARES, token_label, unexpected
from .source import Span
from .syntax_error import (
    Slip,
    dropped,
    foreign_spelling,
    is_unit,
    joined_unit,
    missing_comma,
    not_closed,
    not_opened,
    replaced,
    spaced_unit,
    syntax,
    too_deep,
    wrong_sign,
)
from .unknown_tokens import bare_text, open_string, quoted, strange

WORDS = {"True": "true", "False": "false"}


def diagnose(scene: Scene) -> Slip:
    for types, expected, rule in TABLE:
        if (types is None or scene.token.type in types) and expected <= scene.expected:
            slip = rule(scene)
            if slip is not None:
                return slip
    return unexpected(scene)


# Brackets


def _unclosed(scene: Scene) -> Slip | None:
    token, open = scene.token, scene.open
    if not open:
        return None
    opener = scene.tokens[open[-1]]
    at_end = (
        token.type == "$END"
        or scene.is_head(scene.at)
        or (scene.inner and scene.at > scene.start and scene.is_step(scene.at))
    )
    crossed = (
        token.type in CLOSERS
        and opener.type != CLOSERS[token.type]
        and any(scene.tokens[i].type == CLOSERS[token.type] for i in open)
    )
    if not (at_end or crossed):
        return None
    closer = OPENERS[opener.type]
    where = "the file ends here" if token.type == "$END" else f"`{closer}` is expected before this"
    return Slip(
        not_closed(
            f"`{opener}` is not closed",
            scene.span(token),
            label=where,
            related=((scene.span(opener), "opened here"),),
            help=f"add `{closer}`",
        )
    )


def _unopened(scene: Scene) -> Slip | None:
    if any(scene.tokens[i].type == CLOSERS[scene.token.type] for i in scene.open):
        return None
    return Slip(
        not_opened(f"`{scene.token}` closes nothing", scene.span(scene.token), help="remove it, or open it earlier")
    )


def _too_deep(scene: Scene) -> Slip | None:
    return (
        Slip(
            too_deep(
                f"parentheses and brackets are nested more than {DEPTH} deep",
                scene.span(scene.token),
                help="split the list, or name parts of it",
            )
        )
        if scene.deep
        else None
    )


# Signs and commas


def _equal_for_colon(scene: Scene) -> Slip:
    name = scene.previous
    if scene.owner == "param":
        return Slip(
            syntax(f"`{name}` has no type", scene.span(name), help=f"write its type: `param {name}: ratio = ...`")
        )
    return replaced(
        scene,
        "COLON",
        ":",
        f"`{scene.token}` stands where `:` is meant",
        f"arguments and entries are written `{name}: value`",
    )


def _colon_for_equal(scene: Scene) -> Slip:
    return replaced(
        scene,
        "EQUAL",
        "=",
        f"`{scene.token}` stands where `=` is meant",
        "declarations and steps are written `name = word(...)`",
    )


def _equal_for_compare(scene: Scene) -> Slip:
    return replaced(scene, "COMPARE", "==", "`=` compares nothing", "write `<=`, `>=` or `==`", sure=False)


def _comma(scene: Scene) -> Slip | None:
    if not scene.inner:
        return None
    unit = spaced_unit(scene)
    if unit:
        return unit
    if scene.token in ("off", "fo", "to", "out") and scene.following.type == "NAME":
        return Slip(
            syntax(
                f"`{scene.token}` stands where `of` is expected",
                scene.span(scene.token),
                help="a share is written `85% of channels`",
            )
        )
    end = scene.previous.end_pos
    gap = Span(scene.source, end, end)
    if scene.previous.type == "NAME" and "COLON" in scene.expected and scene.following.type != "COLON":
        return Slip(
            wrong_sign(
                f"a `:` is missing after `{scene.previous}`",
                scene.span(scene.token),
                help=f"arguments and entries are written `{scene.previous}: value`",
                fix=Fix(gap, ":"),
            ),
            True,
            ("COLON", ":"),
        )
    return Slip(
        missing_comma(
            f"a comma is missing before `{token_label(scene.token)}`",
            scene.span(scene.token),
            help="arguments, items and shares are separated by `,`",
            fix=Fix(gap, ","),
        ),
        True,
        ("COMMA", ","),
    )


def _late_unit(scene: Scene) -> Slip | None:
    """In a block, `24 GiB` looks like an entry named GiB until the next token."""
    if scene.at != scene.start + 1 or scene.start < 2:
        return None
    number, unit = scene.tokens[scene.start - 1], scene.tokens[scene.start]
    if number.type != "NUMBER" or number.line != unit.line or not is_unit(unit):
        return None
    return joined_unit(scene, number, unit, repairs=False)


def _needless_comma(scene: Scene) -> Slip | None:
    if scene.inner:
        return None
    item = ITEMS.get(scene.owner, ("", ""))[0].split(" ")[-1] or "statement"
    return dropped(
        scene,
        scene.span(scene.token),
        wrong_sign,
        f"no comma stands between {_plural(item)}",
        "spaces or new lines are enough",
    )


def _plural(item: str) -> str:
    return item[:-1] + "ies" if item.endswith("y") else item + "s"


# Words


def _python_word(scene: Scene) -> Slip | None:
    token = scene.token
    if token in WORDS:
        return replaced(
            scene,
            WORDS[token].upper(),
            WORDS[token],
            f"`{token}` is written `{WORDS[token]}`",
            f"write `{WORDS[token]}`",
            foreign_spelling,
        )
    if token == "None":
        return Slip(foreign_spelling("there is no `None`", scene.span(token), help="leave the argument out"))
    return None


def _ratio_of_zeros(scene: Scene) -> Slip | None:
    """`pattern: 2:4`, which is a text."""
    before, after = scene.previous, scene.following
    if before.type != "NUMBER" or after.type != "NUMBER" or before.end_pos != scene.token.start_pos:
        return None
    both = Span(scene.source, before.start_pos, after.end_pos)
    quoted = f'"{both.text}"'
    return Slip(
        wrong_sign(f"`{both.text}` is written in quotes", both, help=f"write `{quoted}`", fix=Fix(both, quoted))
    )


def _pattern(scene: Scene) -> Slip:
    return Slip(
        syntax("a pattern stands outside quotes", scene.span(scene.token), help='write it in quotes: `"*.mlp"`')
    )


def _quoted_name(scene: Scene) -> Slip | None:
    """`{"blocks": 44}`, as in JSON."""
    text = scene.token[1:-1]
    if scene.inner != "LBRACE" or not text.isidentifier() or not text.isascii():
        return None
    return replaced(scene, "NAME", text, "names of shares stand without quotes", f"write `{text}`", foreign_spelling)


def _alternatives(scene: Scene) -> Slip | None:
    """`{q,k}_proj`, whose braces look like shares."""
    if scene.inner != "LBRACE" or scene.tokens[scene.at - 2].type not in ("LBRACE", "COMMA"):
        return None
    return Slip(
        syntax(
            f"`{token_label(scene.previous)}` has no share",
            scene.span(scene.previous),
            help=f"shares are written `{SHARES}`, lists `[a, b]`, patterns in quotes",
        )
    )


def _yaml_list(scene: Scene) -> Slip:
    return Slip(foreign_spelling("`-` starts no list", scene.span(scene.token), help="lists are written `[a, b]`"))


def _factor(scene: Scene) -> Slip | None:
    if scene.previous.type != "STAR":
        return None
    base = scene.tokens[scene.at - 2]
    return Slip(
        syntax("the factor stands before the baseline", scene.span(scene.token), help=f"write `{scene.token} * {base}`")
    )


def _statement(scene: Scene) -> Slip | None:
    """A word between statements that starts none."""
    from difflib import get_close_matches

    token, span = scene.token, scene.span(scene.token)
    if scene.owner:
        return None
    close = get_close_matches(token.lower(), HEADS, n=1, cutoff=0.7)
    if token in ("import", "from", "include"):
        close = ["use"]
    if close and scene.following.type != "EQUAL":
        help = f"did you mean `{close[0]}`?"
    elif scene.previous.type == "RPAR" and scene.following.type == "COLON":
        help = "arguments stand inside the parentheses"
    elif scene.following.type == "EQUAL":
        help = "steps stand inside `pipeline NAME(MODEL) { ... }`; models are declared with `model`"
    else:
        help = "a statement starts with " + ", ".join(f"`{h}`" for h in HEADS[:-1]) + f" or `{HEADS[-1]}`"
    return Slip(syntax(f"`{token_label(token)}` starts no statement", span, help=help))


Row = tuple[frozenset | None, frozenset, Callable[[Scene], Slip | None]]


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
    _row("QUOTED STRANGE FOREIGN", "", strange),
    _row("NAME", "NUMBER", _python_word),
    _row("EQUAL COMPARE", "COLON", _equal_for_colon),
    _row("COLON COMPARE", "EQUAL", _colon_for_equal),
    _row("COLON", "COMMA", _ratio_of_zeros),
    _row("EQUAL", "COMPARE", _equal_for_compare),
    _row("NAME DOTTED NUMBER STRING LONG_STRING LSQB", "COMMA", _comma),
    _row("NAME", "", spaced_unit),
    _row("", "COLON", _late_unit),
    _row("", "COMPARE", _late_unit),
    _row("COMMA", "RBRACE", _needless_comma),
    _row("COMMA", "$END", _needless_comma),
    _row("STAR", "STRING", _pattern),
    _row("STRING", "NAME", _quoted_name),
    _row("COMMA RBRACE", "COLON", _alternatives),
    _row("MINUS", "STRING", _yaml_list),
    _row("NUMBER", "NAME", _factor),
    _row("NAME DOTTED NUMBER STRING LONG_STRING", "$END", _statement),
)

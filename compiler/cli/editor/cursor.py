"""Context of a cursor in a recipe, by tokens: the text around it is often incomplete."""

import re
from dataclasses import dataclass, field, replace
from typing import Any

from ....dsl.syntax.edition import HEADS
from ....dsl.syntax.lexer import tokenize
from ....dsl.syntax.source import Source

_WORD = re.compile(r"[A-Za-z_][\w.]*$")
_UNIT = re.compile(r"-?\d[\d_]*(\.\d+)?([A-Za-z%]*)$")
_STRINGS = ("STRING", "LONG_STRING", "OPEN_STRING", "OPEN_LONG_STRING")


@dataclass(frozen=True)
class Frame:
    """An open bracket: of a call, with the parameter that is being given and those given before; else of a block,
    a list or shares."""

    sign: str
    call: str = ""
    argument: str = ""
    names: tuple[str, ...] = ()
    slot: int = 0


@dataclass(frozen=True)
class CursorContext:
    """head: keyword of the statement, "" between two; subject: the name behind it; step: the one that is
    being written; frames: open brackets, outermost
    first; before: the last words and signs of the item; word: what is written so far, from `start`."""

    head: str = ""
    subject: str = ""
    step: str = ""
    frames: tuple[Frame, ...] = ()
    before: tuple[str, ...] = ()
    word: str = ""
    start: int = 0
    quoted: bool = False
    number: bool = False
    comment: bool = False
    first: bool = True  # whether nothing stands before the word on its line

    @property
    def call(self) -> Frame | None:
        """The innermost open call; lists and shares in its arguments belong to it."""
        return next((f for f in reversed(self.frames) if f.call), None)

    @property
    def depth(self) -> int:
        return sum(bool(f.call) for f in self.frames)


def cursor_context_at(source: Source, offset: int) -> CursorContext:
    scanned: tuple[list[Any], list[Any]] = tokenize(source)
    tokens, comments = scanned
    text = source.text[:offset]
    if any(c.span.start < offset <= c.span.end for c in comments):
        return CursorContext(comment=True, start=offset)
    inside = next(
        (t for t in tokens if t.type in _STRINGS and t.start_pos < offset and _is_inside_string(t, offset)), None
    )
    if inside is not None:
        quotes = 3 if "LONG" in inside.type else 1
        start, word, number = min(inside.start_pos + quotes, offset), "", False
        word = text[start:]
    elif (unit := _UNIT.search(text)) and not re.search(r"[A-Za-z_.]$", text[: unit.start()]):
        start, word, number = unit.start(2), unit[2], True
    else:
        match = _WORD.search(text)
        start, word, number = (match.start() if match else offset), match[0] if match else "", False
    bound = inside.start_pos if inside is not None else start
    walk = _Walk()
    for before in (t for t in tokens if t.end_pos <= bound and t.type != "$END"):
        walk.push_token(before)
    line = text[max(text.rfind("\n", 0, bound), text.rfind("\r", 0, bound)) + 1 : bound]
    return replace(
        walk.context(), word=word, start=start, quoted=inside is not None, number=number, first=not line.strip()
    )


def _is_inside_string(token, offset: int) -> bool:
    """Whether an offset is inside a string, and not behind its closing quotes."""
    return offset < token.end_pos or (token.type.startswith("OPEN") and offset == token.end_pos)


@dataclass
class _Walk:
    head: str = ""
    subject: str = ""
    step: str = ""
    frames: list[Frame] = field(default_factory=list)
    item: list[str] = field(default_factory=list)
    last: str = ""  # type of the token before
    line: int = 0

    def push_token(self, token) -> None:
        fresh = token.line != self.line
        if token in HEADS and token.type == "NAME" and fresh and (token.column == 1 or not self.frames):
            self.head, self.subject, self.step, self.frames, self.item = str(token), "", "", [], []
        elif token.type in ("LPAR", "LSQB", "LBRACE"):
            self.push_bracket(token)
        elif token.type in ("RPAR", "RSQB", "RBRACE"):
            self.close_bracket()
        elif self.frames and self.frames[-1].call and token.type in ("COLON", "COMMA"):
            self.push_argument_separator(token.type)
        elif self.item and not self.subject and len(self.item) == 1 and token.type in ("NAME", "DOTTED"):
            self.subject = str(token)
        elif token.type == "EQUAL" and len(self.frames) == 1:
            self.step = self.item[-1]
        self.item.append(str(token))
        self.last, self.line = token.type, token.end_line

    def push_bracket(self, token) -> None:
        named = self.last in ("NAME", "DOTTED") and token.type == "LPAR"
        declares = self.head == "pipeline" and not self.frames
        self.frames.append(Frame(str(token), self.item[-1] if named and not declares else ""))

    def close_bracket(self) -> None:
        if self.frames:
            self.frames.pop()
        if not self.frames and self.head in ("profile", "matrix", "pipeline", "expect", "emit") and self.last != "(":
            closes_name = self.head == "pipeline" and "{" not in self.item
            if not closes_name:
                self.head, self.item = "", []

    def push_argument_separator(self, kind: str) -> None:
        top = self.frames[-1]
        if kind == "COLON":
            self.frames[-1] = replace(top, argument=self.item[-1], names=(*top.names, self.item[-1]))
        else:
            self.frames[-1] = replace(top, argument="", slot=top.slot + (not top.argument))

    def context(self) -> CursorContext:
        return CursorContext(self.head, self.subject, self.step, tuple(self.frames), tuple(self.item[-4:]))

"""Offsets in a text as the places that editors count: lines, and columns in units of UTF-16."""

import re
from bisect import bisect_right
from functools import cached_property

from lsprotocol import types as lsp

from ....dsl.syntax.source import Span

_LINE_ENDS = re.compile(r"\r\n|\n|\r")  # the ends of lines that the protocol knows; form feeds and the like are none


class Lines:
    """The lines of a text. Places beyond a line or the text are its end."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def starts(self) -> list[int]:
        return [0, *(end.end() for end in _LINE_ENDS.finditer(self.text))]

    def position(self, offset: int) -> lsp.Position:
        line = bisect_right(self.starts, offset) - 1
        return lsp.Position(line, num_utf16_units(self.text[self.starts[line] : offset]))

    def offset(self, position: lsp.Position) -> int:
        if position.line >= len(self.starts):
            return len(self.text)
        start = self.starts[position.line]
        end = self.starts[position.line + 1] if position.line + 1 < len(self.starts) else len(self.text)
        line, units_before = self.text[start:end].rstrip("\r\n"), 0
        for i, character in enumerate(line):
            if units_before >= position.character:
                return start + i
            units_before += num_utf16_units(character)
        return start + len(line)

    def range(self, span: Span) -> lsp.Range:
        return self.between(span.start, span.end)

    def between(self, start: int, end: int) -> lsp.Range:
        return lsp.Range(self.position(start), self.position(end))

    @property
    def full_range(self) -> lsp.Range:
        return self.between(0, len(self.text))


def num_utf16_units(text: str) -> int:
    """Length of a text in UTF-16 units."""
    return len(text) + sum(character > "\uffff" for character in text)

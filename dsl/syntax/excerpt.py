"""The lines of a source that a diagnostic shows, with marks under the spans."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from .source import Source, Span

TAB = 4  # columns a tab is shown as
WIDTH = 100  # columns of source text shown; longer lines are cropped around the span
ELLIPSIS = "…"

Marked = tuple[Span, str, str]  # span, "^" or "-", what is said beside it


@dataclass(frozen=True)
class Excerpt:
    """Spans of one source."""

    spans: list[Marked]

    @property
    def source(self) -> Source:
        return self.spans[0][0].source

    @property
    def width(self) -> int:
        """Columns of the line numbers."""
        return max(4, *(len(str(span.line)) for span, _, _ in self.spans))

    def printable_rows(self) -> Iterator[tuple[str, str, str]]:
        """(gutter, text, mark): lines in order, each followed by its marks; `...` for those left out."""
        by_line: dict[int, list[Marked]] = {}
        for marked in sorted(self.spans, key=lambda m: (m[0].start, m[1] != "^")):
            by_line.setdefault(marked[0].line, []).append(marked)
        last = None
        for line, marks in by_line.items():
            if last is not None and line > last + 1:
                yield f"{'...':>{self.width}}", "", ""
            yield from self._rows_of_line(line, marks)
            last = line

    def _rows_of_line(self, line: int, marks: list[Marked]) -> Iterator[tuple[str, str, str]]:
        raw, start = self.source.line(line), self.source.starts[line - 1]
        display, columns = _display_text_and_columns(raw)
        left, right = _column_window(columns, *self._columns(marks[0][0], raw, start, columns))
        text, offset = _crop_to_columns(display, columns, left, right)
        yield f"{line:>{self.width}} | ", text, ""
        blank = f"{'':>{self.width}} | "
        continues = False
        for span, sign, label in marks:
            low, high = self._columns(span, raw, start, columns)
            low, high = max(low, left), min(high, right)
            if low <= high:
                yield (
                    blank,
                    " " * (low - left + offset) + sign * max(1, high - low) + (f" {label}" if label else ""),
                    sign,
                )
            continues |= span.end > start + len(raw) + 2
        if continues:
            yield f"{'...':>{self.width}}", "", ""

    @staticmethod
    def _columns(span: Span, raw: str, start: int, columns: list[int]) -> tuple[int, int]:
        """Display columns of the part of a span that lies on its first line."""
        low, high = min(span.start - start, len(raw)), min(span.end - start, len(raw))
        return columns[low], columns[max(low, high)]


def _display_text_and_columns(raw: str) -> tuple[str, list[int]]:
    """Display text of a line, and the display column of every character of it and of its end."""
    characters, columns, at = [], [], 0
    for c in raw:
        columns.append(at)
        if c == "\t":
            characters.append(" " * (TAB - at % TAB))
            at += TAB - at % TAB
        elif unicodedata.category(c) in ("Mn", "Me", "Cf") and c not in BIDI:
            characters.append(c)
        else:
            characters.append(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}")
            at += 2 if unicodedata.east_asian_width(c) in "WF" else 1
    return "".join(characters), [*columns, at]


# Characters that turn the direction of text, so that what is seen is not what is read.
BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _column_window(columns: list[int], low: int, high: int) -> tuple[int, int]:
    """The display columns to show: all, or `WIDTH` of them around a span."""
    total = columns[-1]
    if total <= WIDTH:
        return 0, total
    left = max(0, min(low - WIDTH // 3, total - WIDTH))
    return left, left + WIDTH


def _crop_to_columns(text: str, columns: list[int], first_column: int, last_column: int) -> tuple[str, int]:
    """The text between two display columns with ellipses, and how many columns stand before it."""
    if (first_column, last_column) == (0, columns[-1]):
        return text, 0
    visible, at = [], 0
    for c in text:
        wide = (
            0
            if unicodedata.category(c) in ("Mn", "Me", "Cf") and c not in BIDI
            else (2 if unicodedata.east_asian_width(c) in "WF" else 1)
        )
        if first_column <= at and at + wide <= last_column:
            visible.append(c)
        elif at < first_column < at + wide or at < last_column < at + wide:
            visible.append(" ")  # half of a wide character
        at += wide
    before = ELLIPSIS if first_column > 0 else ""
    return before + "".join(visible) + (ELLIPSIS if last_column < columns[-1] else ""), len(before)

"""Sources of text, and the spans that diagnostics point at."""

from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Source:
    """A named text. `name` is what a user would call it: the path as it was given.

    foreign   it lies outside the recipe's folder and the library: who wrote the recipe may not be who may read it
    root      folder of the package that it belongs to, which it may name nothing outside of; "" of none
    """

    name: str
    text: str = field(repr=False)
    foreign: bool = field(default=False, repr=False)
    root: str = field(default="", repr=False)

    @cached_property
    def starts(self) -> list[int]:
        """Offset of the first character of every line."""
        return [0] + [i + 1 for i, c in enumerate(self.text) if c == "\n"]

    def line(self, line_number: int) -> str:
        """The text of a line, counted from 1, without its end."""
        starts = self.starts
        end = starts[line_number] - 1 if line_number < len(starts) else len(self.text)
        return self.text[starts[line_number - 1] : end].rstrip("\r")

    def position(self, offset: int) -> tuple[int, int]:
        """Line and column of an offset, both counted from 1, columns in characters."""
        from bisect import bisect_right

        number = bisect_right(self.starts, offset)
        return number, offset - self.starts[number - 1] + 1


@dataclass(frozen=True)
class Span:
    """Characters `start` (included) to `end` (excluded) of a source."""

    source: Source = field(repr=False)
    start: int
    end: int

    @property
    def line(self) -> int:
        return self.source.position(self.start)[0]

    @property
    def column(self) -> int:
        return self.source.position(self.start)[1]

    @property
    def text(self) -> str:
        return self.source.text[self.start : self.end]

    def to(self, other: "Span") -> "Span":
        """The span from the start of this one to the end of the other."""
        return Span(self.source, self.start, other.end)

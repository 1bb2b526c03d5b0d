"""Places in options of a command line, for mistakes of a recipe that was written from them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ....dsl.syntax.diagnostics import Diagnostic, Fix
from ....dsl.syntax.source import Source, Span


@dataclass(frozen=True)
class OptionText:
    """Text of an option in a recipe.

    start      where it begins in the recipe
    insertion  offset in it behind which the recipe has `inserted` characters more
    """

    option: str
    text: str
    start: int
    insertion: int = 0
    inserted: int = 0

    def span(self, start: int, end: int) -> Span | None:
        """Place in the option of characters of the recipe; None of those outside of it."""
        length = len(self.text) + self.inserted
        if not self.start <= start <= end <= self.start + length:
            return None
        low, high = (self._offset_in_option(position - self.start) for position in (start, end))
        return Span(Source(self.option, self.text), low, max(high, min(low + 1, len(self.text))))

    def _offset_in_option(self, position: int) -> int:
        if position <= self.insertion:
            return position
        return max(self.insertion, position - self.inserted)


def located_in_options(
    diagnostics: Sequence[Diagnostic], recipe: Source, options: Sequence[OptionText]
) -> list[Diagnostic]:
    """Diagnostics with their places in the options; those of words that nobody wrote have none."""

    def located(span: Span | None) -> Span | None:
        if span is None or span.source.name != recipe.name:
            return span
        spans = (option.span(span.start, span.end) for option in options if span.source.text == recipe.text)
        return next((s for s in spans if s is not None), None)

    def located_fix(fix: Fix | None) -> Fix | None:
        return replace(fix, span=target) if fix and (target := located(fix.span)) else None

    return [
        replace(
            d,
            span=located(d.span),
            related=tuple((target, text) for span, text in d.related if (target := located(span)) is not None),
            fix=located_fix(d.fix),
            offer=located_fix(d.offer),
        )
        for d in diagnostics
    ]

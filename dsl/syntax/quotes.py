"""A text that stands without its quotes."""

from .diagnostics import Diagnostic, Fault, Fix
from .source import Span

missing_quotes = Fault("missing-quotes", "A path, a pattern or another text stands without its quotes.")


def missing_quotes_diagnostic(text: str, span: Span) -> Diagnostic:
    """Diagnostic for a missing pair of quotes, with the quotes as a fix."""
    return missing_quotes(f"`{text}` stands without quotes", span, help=f'write `"{text}"`', fix=Fix(span, f'"{text}"'))

"""Diagnostics of one place, of which one says enough."""

from .diagnostics import Diagnostic


def is_at_or_around(error: Diagnostic, other: Diagnostic) -> bool:
    """Whether an error is of the same place, or of one around it: whoever mends it need not be told the other."""
    around, within = error.span, other.span
    return (
        error.severity == "error"
        and around is not None
        and within is not None
        and around.source is within.source
        and around.start <= within.start <= within.end <= around.end
    )


def hides_checker_error(syntax_error: Diagnostic, checker_error: Diagnostic) -> bool:
    """Whether the checker says something of a value that the parser could not read: it knows a stand-in of it, or the
    number in front of a space and a unit."""
    unread = syntax_error.span is not None and syntax_error.span == checker_error.span
    return unread or (syntax_error.slug == "wrong-sign" and is_at_or_around(syntax_error, checker_error))

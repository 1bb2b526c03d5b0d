"""Diagnostics that know no place get that of the call that they came from."""

from collections.abc import Iterator
from contextlib import contextmanager

from ...dsl.checker.recipe import Invocation
from ...dsl.syntax.diagnostics import Diagnostic, Reject
from ...dsl.syntax.source import Span


@contextmanager
def diagnostics_located_at(location: Span | Invocation | None) -> Iterator[None]:
    """A diagnostic that has no place gets this one; of a call, that of the argument which it blames."""
    try:
        yield
    except Reject as rejection:
        if isinstance(location, Invocation):
            raise Reject(*(d.at(span_of_blamed_argument(location, d)) for d in rejection.diagnostics)) from rejection
        raise Reject(*(d.at(location) for d in rejection.diagnostics)) from rejection


def span_of_blamed_argument(call: Invocation, diagnostic: Diagnostic) -> Span | None:
    """The argument that a diagnostic blames, where the recipe gives it; else the whole call."""
    return call.argument_or_call_span(next((name for name in diagnostic.argument.split() if name in call.spans), ""))

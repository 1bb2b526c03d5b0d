"""Diagnostics that know no place get that of the call that they came from."""

from collections.abc import Iterator
from contextlib import contextmanager

from ...dsl.diagnostics import Reject
from ...dsl.source import Span


@contextmanager
def placed(span: Span | None) -> Iterator[None]:
    """A diagnostic that has no place gets this one."""
    try:
        yield
    except Reject as refused:
        raise Reject(*(d.at(span) for d in refused.diagnostics)) from refused

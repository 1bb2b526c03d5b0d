"""Time limit for the searches of a compile, and the record of a search that it stopped."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...dsl.syntax.diagnostics import Diagnostic, Fault, Reject
from .quantity import duration_text

out_of_time = Fault(
    "out-of-time",
    "A search had no more time, as `--max-time` says.\n\n"
    "What it had found by then is emitted, under a key of its own in the cache. Every score is kept: `effc compile` "
    "again, with more time or without a bound, goes on from there to the result that it would have had at once.",
    exit="resources",
)
no_time = Fault(
    "no-time",
    "`--max-time` is too short for the first decision of a search.\n\n"
    "Nothing is emitted. Every score so far is kept, and `effc compile` again goes on from there.",
    exit="resources",
)


class DeadlineExceeded(Exception):
    """The time for searches is over."""


@dataclass(frozen=True)
class EarlyStop:
    """Record of a stopped search: `reached` in words, `facts` as they are part of its result's key."""

    reached: str
    facts: dict[str, Any]


class Deadline:
    """The time that searches have from now on, in seconds. Other work is not cut short: it has no best so far."""

    def __init__(self, allowed_seconds: float):
        self.allowed, self.started_at = allowed_seconds, time.monotonic()
        self.stop: EarlyStop | None = None
        self._breaks = False

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started_at

    @contextmanager
    def may_interrupt_search(self) -> Iterator[None]:
        """Let `check` end what runs inside: what it was about can be left unfinished."""
        before, self._breaks = self._breaks, True
        try:
            self.check()
            yield
        finally:
            self._breaks = before

    def check(self) -> None:
        """Raises DeadlineExceeded where the time is over and what runs may be left."""
        if self._breaks and self.elapsed > self.allowed:
            raise DeadlineExceeded

    def pop_early_stop(self) -> EarlyStop | None:
        """Record of the stop of the running search; returned once."""
        stop, self.stop = self.stop, None
        return stop

    def too_short_rejection(self, decision: str, needed_seconds: float) -> Reject:
        """Rejection for a time that is too short for the first decision of a search; it takes about so many seconds
        `needed_seconds`."""
        least = self.elapsed + needed_seconds
        return no_time(
            f"{duration_text(self.allowed)} are too short for {decision}: that takes about {duration_text(least)}",
            help=f"give `--max-time {max_time_text(1.1 * least)}` or more, or none; what was scored so far is kept",
        ).rejection()

    def stopped_early_diagnostic(self, step_name: str, stop: EarlyStop) -> Diagnostic:
        return out_of_time(
            f"`{step_name}` stopped after {duration_text(self.allowed)} at the best so far: {stop.reached}",
            help="compile again with more time, or without `--max-time`: it goes on from there",
        )


def max_time_text(seconds: float) -> str:
    """Seconds as `--max-time` reads them, rounded up: `40s`, `12m`."""
    return f"{int(seconds) + 1}s" if seconds < 120 else f"{int(seconds / 60) + 1}m"

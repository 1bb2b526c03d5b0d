"""Diagnostics of users' mistakes: a fact, a location and a remedy.

A `Fault` is a kind of mistake, made once as a module constant beside the code that finds it. Calling it
makes a `Diagnostic`. Checkers gather diagnostics and `raise Reject(*diagnostics)` once.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from .source import Span

Severity = Literal["error", "warning", "note"]

# The exit codes of the command line, one table.
EXITS = {
    "success": 0,
    "failure": 1,
    "usage": 2,
    "recipe": 3,
    "gate": 4,
    "environment": 5,
    "resources": 6,
    "work-to-do": 7,
    "network": 8,
    "interrupted": 130,
}

_faults: dict[str, "Fault"] = {}


@dataclass(frozen=True)
class Fault:
    """A kind of mistake. `exit` is the name of the exit code that a command ends with."""

    slug: str
    doc: str
    exit: str = "recipe"
    severity: Severity = "error"

    def __post_init__(self):
        assert self.exit in EXITS, f"{self.exit} is no exit code"
        known = _faults.setdefault(self.slug, self)
        assert known == self, f"the slug {self.slug} names two faults"

    def __call__(
        self,
        message: str,
        span: Span | None = None,
        *,
        help: str = "",
        note: str = "",
        label: str = "",
        related: tuple[tuple[Span, str], ...] = (),
        fix: "Fix | None" = None,
        offer: "Fix | None" = None,
        argument: str = "",
    ) -> "Diagnostic":
        return Diagnostic(self, message, span, label, help, note, tuple(related), fix, offer, argument)


@dataclass(frozen=True)
class Fix:
    """Text to put in place of a span; offered only where it is sure to be what was meant."""

    span: Span
    text: str


@dataclass(frozen=True)
class Diagnostic:
    fault: Fault
    message: str
    span: Span | None = None
    label: str = ""  # said beside the caret
    help: str = ""  # what to do
    note: str = ""  # what else is known
    related: tuple[tuple[Span, str], ...] = ()
    fix: Fix | None = None
    offer: Fix | None = None  # a rewrite that may be what was meant: an editor asks, `check --fix` leaves it
    argument: str = ""  # of the running word, which is to blame: "keep remove" is the one that is given

    @property
    def slug(self) -> str:
        return self.fault.slug

    @property
    def severity(self) -> Severity:
        return self.fault.severity

    @property
    def exit(self) -> int:
        return EXITS[self.fault.exit]

    def at(self, span: Span | None) -> "Diagnostic":
        """The same, with a place if it had none: the pipeline adds the line of the step that ran."""
        return self if self.span or span is None else replace(self, span=span)

    def rejection(self) -> "Reject":
        """The error of this one alone: `raise unknown_name(...).rejection()`."""
        return Reject(self)


@dataclass
class Reject(Exception):
    """The only exception for a user's mistake; carries at least one diagnostic."""

    diagnostics: tuple[Diagnostic, ...] = field(default=())

    def __init__(self, *diagnostics: Diagnostic):
        assert diagnostics, "a Reject says why"
        self.diagnostics = sorted_distinct_diagnostics(diagnostics)
        super().__init__("\n".join(f"{d.slug}: {d.message}" for d in self.diagnostics))

    @property
    def exit(self) -> int:
        return next((d.exit for d in self.diagnostics if d.severity == "error"), 0)


def sorted_distinct_diagnostics(diagnostics) -> tuple[Diagnostic, ...]:
    """Sorted by place, those without a place first, equal ones once."""

    def key(d: Diagnostic) -> tuple[str, int, int]:
        return (d.span.source.name, d.span.start, d.span.end) if d.span else ("", -1, -1)

    return tuple(sorted(dict.fromkeys(diagnostics), key=key))

"""Events of a compile, as frozen records passed to one callable.

Renderers (bars on a terminal, plain lines, JSON lines) live in compiler/core/progress_bars.py; nothing below the
command line prints.

What is far below a stage, such as the loss over rows or the writing of tensors, tells through `iterate_and_report` and
`announcing_stage`, which find the listener of the running stage themselves: handing it down would put an argument into
every function that may take five seconds.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from typing import TypeVar

from ...dsl.syntax.diagnostics import Diagnostic

T = TypeVar("T")


@dataclass(frozen=True)
class Event:
    """`at` is seconds since the epoch."""

    at: float = field(default_factory=time.time, kw_only=True)

    def to_json(self) -> dict:
        return {"event": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class StageBegan(Event):
    """A stage: capture, a step of the recipe, emit, verify. `index` of `total` stages of the compile."""

    stage: str
    about: str = ""
    index: int = 0
    total: int = 0


@dataclass(frozen=True)
class Ticked(Event):
    """`done` of `total` items of the running stage; `note` is what is best so far, or comes next, in a few words.

    A total of 0 is work in one piece, of which nobody knows how much is left.
    """

    label: str
    done: int
    total: int
    note: str = ""

    @property
    def is_last(self) -> bool:
        """Whether all items are done, and nothing is said of a next one."""
        return 0 < self.total <= self.done and not self.note


@dataclass(frozen=True)
class Recorded(Event):
    """A measured value: before and after lines, losses, scores."""

    name: str
    value: float
    unit: str = ""


@dataclass(frozen=True)
class Pruned(Event):
    """A search has cut this out of the model of the running step."""

    name: str


@dataclass(frozen=True)
class StageEnded(Event):
    """`change` is the measured change as a person would say it: `-4 branches, -12.3 M params`; `dump` the shape
    diff, where it was asked for."""

    stage: str
    seconds: float
    cached: bool = False
    change: str = ""
    peak_bytes: int = 0
    dump: str = ""


@dataclass(frozen=True)
class Said(Event):
    """Remark of a stage, in one line."""

    message: str


@dataclass(frozen=True)
class Warned(Event):
    """A diagnostic of severity "warning"; it is no progress, and is shown where progress is not."""

    diagnostic: Diagnostic

    @property
    def message(self) -> str:
        """One line: `warning[few-rows]: ...; what to do`."""
        d = self.diagnostic
        return f"{d.severity}[{d.slug}]: " + "; ".join(part for part in (d.message, d.note, d.help) if part)

    def to_json(self) -> dict:
        return {"event": "Warned", "slug": self.diagnostic.slug, "message": self.message, "at": self.at}


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """The listener of library calls: says nothing."""


_listener: ContextVar[Listener] = ContextVar("listener", default=silent)


@contextmanager
def listening_with(listener: Listener) -> Iterator[None]:
    """Make `listener` the listener of what `iterate_and_report` and `announcing_stage` say inside."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def iterate_and_report(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """`iterate_with_progress` for the listener of the running stage."""
    return iterate_with_progress(items, label, _listener.get(), total)


@contextmanager
def announcing_stage(label: str, next_note: str = "") -> Iterator[None]:
    """Inside, a stage is announced as doing this now and `next_note` next; `iterate_and_report` is part of it."""
    outer = _listener.get()
    outer(Ticked(label, 0, 0, next_note))

    def part(event: Event) -> None:
        outer(replace(event, label=f"{label}: {event.label}") if isinstance(event, Ticked) else event)
        if isinstance(event, Ticked) and event.is_last:
            outer(Ticked(label, 0, 0, next_note))

    with listening_with(part):
        yield


def tick(label: str, note: str = "") -> None:
    """Say what the running stage does now, in one piece."""
    _listener.get()(Ticked(label, 0, 0, note))


def iterate_with_progress(items: Iterable[T], label: str, listener: Listener, total: int | None = None) -> Iterator[T]:
    """Iterate and tell how far it is, at most ten times a second."""
    items = list(items) if total is None else items
    total = len(items) if total is None else total  # type: ignore[arg-type]
    last = 0.0
    for done, item in enumerate(items):
        if time.monotonic() - last > 0.1:
            listener(Ticked(label, done, total))
            last = time.monotonic()
        yield item
    listener(Ticked(label, total, total))

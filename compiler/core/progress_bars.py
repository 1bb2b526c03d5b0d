"""Progress for people and for programs: bars on a terminal, plain lines elsewhere, JSON lines in a file.

Everything goes to stderr. A renderer is a listener of `progress` events and a context manager.
"""

import json
import re
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from io import BufferedWriter, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ...dsl.syntax.render import sanitize_for_terminal
from .events import Event, Listener, Recorded, Said, StageBegan, StageEnded, Ticked, Warned, listening_with
from .pipe_safe import PipeSafeStream
from .quantity import duration_text, measurement_text, size_text

if TYPE_CHECKING:
    from rich.progress import TaskID

HEARTBEAT = 4.0  # seconds without a line after which a long stage says that it lives


class Renderer(ABC):
    """Holds what is running now; events may come from any thread."""

    def __init__(self, stream: TextIO, verbose: int = 0):
        self.stream, self.verbose = stream, verbose
        self.stage: StageBegan | None = None
        self.tick: Ticked | None = None
        self.pace: ItemRate | None = None
        self.lock = threading.RLock()

    def __call__(self, event: Event) -> None:
        with self.lock:
            match event:
                case StageBegan():
                    self.stage, self.tick, self.pace = event, None, None
                    self.stage_started(event)
                case Ticked():
                    if self.stage is None:  # before the first: hashing, finding structure
                        self.stage = StageBegan("plan", at=event.at)
                        self.stage_started(self.stage)
                    if self.pace is None or not self.pace.is_same_work(event):
                        self.pace = ItemRate(event)
                    self.tick = event
                    if event.is_last:  # what comes now has no name yet, and is not what was counted
                        self.tick = self.pace = None
                    self.ticked(event)
                case StageEnded():
                    if self.stage and self.stage.stage != event.stage:
                        self.stage = None  # one that was cached never began
                    self.stage_finished(event)
                    if event.dump:
                        self.line(event.dump.rstrip("\n"))
                    self.stage = self.tick = self.pace = None
                case Recorded():
                    self.recorded(event)
                case Said():
                    self.line(f"       {event.message}")
                case Warned():
                    self.line(event.message)

    @abstractmethod
    def stage_started(self, event: StageBegan) -> None: ...

    @abstractmethod
    def ticked(self, event: Ticked) -> None: ...

    def recorded(self, event: Recorded) -> None:
        if self.verbose:
            self.line(f"       {event.name}  {measurement_text(event.value, event.unit)}")

    @abstractmethod
    def stage_finished(self, event: StageEnded) -> None: ...

    @abstractmethod
    def line(self, text: str) -> None: ...

    def __enter__(self) -> "Renderer":
        return self

    @abstractmethod
    def __exit__(self, *error) -> None: ...


def finished_stage_line(start: StageBegan | None, end: StageEnded) -> str:
    """One line for a finished stage: `2/6  thin  prune.channels  -0.44 M params  12 s  peak 1.2 GiB`."""
    position = f"{start.index}/{start.total}" if start and start.total else ""
    description = start.about if start else ""
    cost = "cached" if end.cached else duration_text(end.seconds)
    peak = f"peak {size_text(end.peak_bytes)}" if end.peak_bytes and not end.cached else ""
    head = f"{position:>5}  {end.stage:<12}"
    return "  ".join(part for part in (head, description, end.change, cost, peak) if part).rstrip()


class ItemRate:
    """Rate of the items of one label, counted from its first event."""

    def __init__(self, first: Ticked):
        self.first = first

    def is_same_work(self, event: Ticked) -> bool:
        """Whether an event goes on with the same work: labels may count (`cut 3, % of the budget`)."""
        return (_DIGITS.sub("", event.label), event.total) == (_DIGITS.sub("", self.first.label), self.first.total)

    def seconds_left(self, latest: Ticked, time_s: float) -> float | None:
        """Seconds until all are done, `time_s` in seconds since the epoch; None where nothing is known yet."""
        done, elapsed = latest.done - self.first.done, time_s - self.first.at
        return elapsed * (latest.total - latest.done) / done if done > 0 and elapsed > 0 else None


_DIGITS = re.compile(r"\d+")


def progress_text(tick: Ticked | None) -> str:
    """`scoring 34/60, best 21.3`; of work in one piece only its name, and what comes then."""
    if tick is None:
        return "running"
    progress = f"{tick.label} {tick.done}/{tick.total}" if tick.total else tick.label
    return f"{progress}, {tick.note}" if tick.note else progress


def running_stage_line(
    stage: StageBegan, tick: Ticked | None, elapsed: float, seconds_left: float | None = None
) -> str:
    """One line for a stage that runs: `2/6  thin  scoring 34/60, best 21.3  (45 s, about 30 s left)`."""
    position = f"{stage.index}/{stage.total}" if stage.total else ""
    remaining = (
        ""
        if seconds_left is None
        else ", less than a second left"
        if seconds_left < 1
        else f", about {duration_text(seconds_left)} left"
    )
    return f"{position:>5}  {stage.stage:<12}  … {progress_text(tick)}  ({duration_text(elapsed)}{remaining})"


class PlainRenderer(Renderer):
    """One line per finished stage, and a heartbeat every few seconds while one runs."""

    def __init__(self, stream: TextIO, verbose: int = 0, heartbeat: float = HEARTBEAT):
        super().__init__(stream, verbose)
        self.heartbeat = heartbeat
        self.stop = threading.Event()
        self.since = self.last_line_at = time.monotonic()

    def stage_started(self, event: StageBegan) -> None:
        self.since = self.last_line_at = time.monotonic()

    def ticked(self, event: Ticked) -> None:
        pass  # the heartbeat tells how far it is

    def stage_finished(self, event: StageEnded) -> None:
        self.line(finished_stage_line(self.stage, event))

    def line(self, text: str) -> None:
        self.last_line_at = time.monotonic()
        print(sanitize_for_terminal(text), file=self.stream, flush=True)

    def __enter__(self) -> "PlainRenderer":
        threading.Thread(target=self._print_heartbeats_until_stopped, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.stop.set()

    def _print_heartbeats_until_stopped(self) -> None:
        while not self.stop.wait(min(1.0, self.heartbeat / 4)):
            with self.lock:
                at = time.monotonic()
                if self.stage and at - self.last_line_at >= self.heartbeat:
                    left = self.pace.seconds_left(self.tick, time.time()) if self.pace and self.tick else None
                    self.line(running_stage_line(self.stage, self.tick, at - self.since, left))


class BarRenderer(Renderer):
    """A bar for the running stage with the time left, and a line above it for each finished one."""

    def __init__(self, stream: TextIO, verbose: int = 0, color: bool = True):
        super().__init__(stream, verbose)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        console = Console(file=stream, force_terminal=True, no_color=not color, highlight=False, soft_wrap=True)
        self.progress = Progress(
            SpinnerColumn(style="cyan"),
            TextColumn("{task.fields[place]}  {task.fields[stage]}"),
            TextColumn("[dim]{task.description}"),
            BarColumn(24, style="bright_black", complete_style="cyan", pulse_style="cyan"),
            TextColumn("{task.fields[state]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            refresh_per_second=8,
        )
        self.task: TaskID | None = None

    def stage_started(self, event: StageBegan) -> None:
        self._remove_task()
        position = f"{event.index}/{event.total}" if event.total else ""
        self.task = self.progress.add_task(event.about, total=None, stage=event.stage, place=position, state="")

    def ticked(self, event: Ticked) -> None:
        if self.task is not None:
            if event.is_last:
                self.progress.update(
                    self.task, description=self.stage.about if self.stage else "", total=None, state=""
                )
                return
            left = self.pace.seconds_left(event, event.at) if self.pace else None
            state = [
                f"{event.done}/{event.total}" if event.total else "",
                f"{duration_text(left)} left" if left else "",
                event.note,
            ]
            self.progress.update(
                self.task,
                description=event.label,
                completed=event.done,
                total=event.total or None,
                state="  ".join(filter(None, state)),
            )

    def stage_finished(self, event: StageEnded) -> None:
        self._remove_task()
        self.line(f"[green]✓[/green]{_escape_rich_markup(finished_stage_line(self.stage, event))}", markup=True)

    def line(self, text: str, markup: bool = False) -> None:
        self.progress.console.print(sanitize_for_terminal(text), markup=markup)

    def _remove_task(self) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
            self.task = None

    def __enter__(self) -> "BarRenderer":
        self.progress.start()
        return self

    def __exit__(self, *error) -> None:
        self._remove_task()
        self.progress.stop()


def _escape_rich_markup(text: str) -> str:
    from rich.markup import escape

    return escape(text)


class JsonLines:
    """Every event as one line of JSON, written at once."""

    def __init__(self, file: TextIO):
        self.file, self.lock = file, threading.Lock()

    def __call__(self, event: Event) -> None:
        with self.lock:
            self.file.write(json.dumps(event.to_json()) + "\n")
            self.file.flush()


@contextmanager
def listening_to_progress(
    *,
    quiet: bool = False,
    progress: bool = True,
    bars: bool = False,
    color: bool = True,
    verbose: int = 0,
    events_path: Path | None = None,
    on_warning: Callable[[Warned, bool], None] = lambda event, displayed: None,
) -> Iterator[Listener]:
    """Listener for a command, alive inside the `with`.

    on_warning   hears every warning, and whether the progress shows it already
    """
    with ExitStack() as stack:
        listeners: list[Listener] = [partial(_forward_warning, on_warning, progress and not quiet)]
        if progress and not quiet:
            renderer = BarRenderer(sys.stderr, verbose, color) if bars else PlainRenderer(sys.stderr, verbose)
            listeners.append(stack.enter_context(renderer))
        if events_path:
            file = TextIOWrapper(
                BufferedWriter(PipeSafeStream(events_path, "w")), encoding="utf-8"
            )  # a pipe's reader may leave
            listeners.append(JsonLines(stack.enter_context(file)))
        listener = partial(_call_all, listeners)
        with listening_with(listener):
            yield listener


def _forward_warning(on_warning: Callable[[Warned, bool], None], displayed: bool, event: Event) -> None:
    if isinstance(event, Warned):
        on_warning(event, displayed)


def _call_all(listeners: list[Listener], event: Event) -> None:
    for listener in listeners:
        listener(event)

"""Response timeouts of workers, by the kind of request."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

Kind = tuple[str, bool]  # the key of a step, "" of a greeting; whether it is this worker's first task of it
POLL_SECONDS = 2.0  # seconds at most that one look counts: who asks may have been stopped in it, or asleep
LONG, TIMEOUT_FACTOR = 3, 10  # times as long as the longest of a kind: to be told, and to be given up


@dataclass
class PendingResponse:
    """An answer that a worker owes. `waited` are seconds in which nobody did anything but wait for answers,
    `mention` how many they were when a line told of them."""

    kind: Kind
    since: float
    waited: float = 0.0
    mention: float = 0.0


@dataclass
class ResponseTimeouts:
    """Pending answers of workers by index, and the longest time of each kind of answer.

    first, least   seconds of silence below which nothing is told, and no worker is given up
    A first task of a step includes reading the model. Of a kind that was never answered nothing is known: a worker is
    waited for then, unless its process is seen to be stopped.
    """

    first: float = 30.0
    least: float = 120.0
    owed: dict[int, PendingResponse] = field(default_factory=dict)
    longest: dict[Kind, float] = field(default_factory=dict)
    met: set[tuple[int, str]] = field(default_factory=set)

    def begin_greeting(self, worker_index: int) -> None:
        """A new worker is greeted, which has met no step."""
        self.met = {one for one in self.met if one[0] != worker_index}
        self.begin_response(worker_index, "")

    def begin_response(self, worker_index: int, step: str) -> None:
        self.owed[worker_index] = PendingResponse((step, (worker_index, step) not in self.met), time.monotonic())
        self.met.add((worker_index, step))

    def end_response(self, worker_index: int, is_measured: bool) -> None:
        """A worker has answered or is lost; `is_measured` where it did what it was asked."""
        owed = self.owed.pop(worker_index, None)
        if owed and is_measured:
            elapsed = time.monotonic() - owed.since
            self.longest[owed.kind] = max(elapsed, self.longest.get(owed.kind, 0.0))

    def add_waited_seconds(self, seconds: float) -> None:
        for owed in self.owed.values():
            owed.waited += min(seconds, POLL_SECONDS)

    def silent_seconds_to_report(self, worker_index: int) -> float:
        """Seconds of silence that are worth a line now, each time twice as many; 0 where they aren't."""
        owed = self.owed[worker_index]
        known = self.longest.get(owed.kind)
        least = 2 * self.first if known is None else max(self.first, LONG * known)
        if owed.waited < max(least, 2 * owed.mention):
            return 0.0
        owed.mention = owed.waited
        return owed.waited

    def is_stale(self, worker_index: int, is_stopped: Callable[[int], bool]) -> bool:
        owed = self.owed[worker_index]
        known = self.longest.get(owed.kind)
        bound = inf if known is None else max(self.least, TIMEOUT_FACTOR * known)
        return owed.waited >= bound or (owed.waited >= 2 * self.first and is_stopped(worker_index))

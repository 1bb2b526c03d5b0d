"""Counts and durations of a server, in the text format of Prometheus."""

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SHARES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Counter:
    """A number that grows, one for each value of a label."""

    def __init__(self, name: str, doc: str, label: str = "", values: Sequence[str] = ("",)):
        self.name, self.doc, self.label = name, doc, label
        self._counts = dict.fromkeys(values, 0)
        self._lock = threading.Lock()

    def add(self, count: int = 1, value: str = "") -> None:
        with self._lock:
            self._counts[value] += count

    def lines(self) -> list[str]:
        rows = [f'{self.name}{{{self.label}="{value}"}} {n}' if self.label else f"{self.name} {n}"
                for value, n in self._counts.items()]
        return [_head(self.name, self.doc, "counter"), *rows]


class Histogram:
    """How often a number was at most each of some bounds."""

    def __init__(self, name: str, doc: str, bounds: Sequence[float] = _SECONDS):
        self.name, self.doc, self._bounds = name, doc, bounds
        self._counts, self._sum = [0] * (len(bounds) + 1), 0.0
        self._lock = threading.Lock()

    def add(self, value: float) -> None:
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._sum += value

    @property
    def mean(self) -> float:
        """0 before the first number."""
        return self._sum / max(1, sum(self._counts))

    def lines(self) -> list[str]:
        with self._lock:
            counts, total = list(self._counts), self._sum
        below, lines = 0, [_head(self.name, self.doc, "histogram")]
        for bound, count in zip([*map(str, self._bounds), "+Inf"], counts, strict=True):
            below += count
            lines.append(f'{self.name}_bucket{{le="{bound}"}} {below}')
        return [*lines, f"{self.name}_sum {total:.6f}", f"{self.name}_count {below}"]


class Gauge:
    """A number that is asked for when someone looks."""

    def __init__(self, name: str, doc: str, read: Callable[[], float]):
        self.name, self.doc, self._read = name, doc, read

    def lines(self) -> list[str]:
        return [_head(self.name, self.doc, "gauge"), f"{self.name} {self._read():g}"]


class Metrics:
    """All of them."""

    def __init__(self):
        ends = ("stop", "length", "cancelled", "failed", "refused")
        self.requests = Counter("effc_requests_total", "Requests by how they ended.", "outcome", ends)
        self.prompt_tokens = Counter("effc_prompt_tokens_total", "Tokens of prompts that were read.")
        self.new_tokens = Counter("effc_generated_tokens_total", "Tokens that were generated.")
        self.first = Histogram("effc_time_to_first_token_seconds", "From a request to its first token.")
        self.step = Histogram("effc_time_per_token_seconds", "Between two tokens of an answer, its mean.")
        self.whole = Histogram("effc_request_seconds", "From a request to its end.")
        self.call = Histogram("effc_call_tokens", "Tokens in one call of the model.", _SHARES)
        self.gauges: list[Gauge] = []

    def text(self) -> str:
        every = (self.requests, self.prompt_tokens, self.new_tokens, self.first, self.step, self.whole,
                 self.call, *self.gauges)
        return "\n".join(line for one in every for line in one.lines()) + "\n"


def _head(name: str, doc: str, kind: str) -> str:
    return f"# HELP {name} {doc}\n# TYPE {name} {kind}"

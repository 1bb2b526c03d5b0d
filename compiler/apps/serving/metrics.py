"""Counts and durations of a server, as `prometheus_client` tells them."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SHARES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_FINISH_REASONS = ("stop", "length", "cancelled", "failed", "refused", "logits_not_finite")
TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """All of one server, in a registry of its own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.requests = self._counter("effc_requests", "Requests by how they ended.", ["outcome"])
        for end in _FINISH_REASONS:
            self.requests.labels(end)
        self.prompt_tokens = self._counter("effc_prompt_tokens", "Tokens of prompts that were read.")
        self.cached_tokens = self._counter(
            "effc_held_tokens", "Tokens of prompts that were known from requests before."
        )
        self.new_tokens = self._counter("effc_generated_tokens", "Tokens that were generated.")
        self.draft_tokens = self._counter("effc_draft_tokens", "Tokens of n-grams that were verified ahead.")
        self.accepted_tokens = self._counter("effc_accepted_draft_tokens", "Tokens of drafts that were accepted.")
        self.first = self._histogram("effc_time_to_first_token_seconds", "From a request to its first token.")
        self.step = self._histogram("effc_time_per_token_seconds", "Between two tokens of an answer, its mean.")
        self.request_seconds = self._histogram("effc_request_seconds", "From a request to its end.")
        self.call = self._histogram("effc_call_tokens", "Tokens in one call of the model.", _SHARES)
        self.answers = self._counter("effc_http_responses", "Answers by the path and the status.", ["path", "status"])
        self.http = self._histogram("effc_http_response_seconds", "From the headers to the end of an answer.")
        self._seconds_text, self._count = 0.0, 0

    def gauge(self, name: str, doc: str, read_value: Callable[[], float]) -> None:
        """A number that is asked for when someone looks."""
        Gauge(name, doc, registry=self.registry).set_function(read_value)

    def request_finished(self, seconds: float) -> None:
        """A request was answered whole."""
        self.request_seconds.observe(seconds)
        self._seconds_text, self._count = self._seconds_text + seconds, self._count + 1

    @property
    def mean(self) -> float:
        """Seconds of a request, 0 before the first."""
        return self._seconds_text / max(1, self._count)

    def add_answer(self, path: str, status: int, seconds: float) -> None:
        self.answers.labels(path, str(status)).inc()
        self.http.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, doc: str, labels: list[str] | None = None) -> Counter:
        return Counter(name, doc, labels or [], registry=self.registry)

    def _histogram(self, name: str, doc: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(name, doc, buckets=buckets, registry=self.registry)

"""Counts and durations of a server, as `prometheus_client` tells them."""

from collections.abc import Callable
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SHARES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_FINISH_REASONS = ("stop", "length", "cancelled", "failed", "refused", "logits_not_finite")
TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Queue(Protocol):
    """Requests of a model."""

    @property
    def n_running(self) -> int: ...

    @property
    def n_waiting(self) -> int: ...


class Metrics:
    """All of one server, in a registry of its own; those of a model have its name as their label `model`."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.requests = self._counter("effc_requests", "Requests by how they ended.", "model", "outcome")
        self.prompt_tokens = self._counter("effc_prompt_tokens", "Tokens of prompts that were read.", "model")
        self.cached_tokens = self._counter(
            "effc_held_tokens", "Tokens of prompts that were known from requests before.", "model"
        )
        self.new_tokens = self._counter("effc_generated_tokens", "Tokens that were generated.", "model")
        self.draft_tokens = self._counter("effc_draft_tokens", "Tokens of n-grams that were verified ahead.", "model")
        self.accepted_tokens = self._counter(
            "effc_accepted_draft_tokens", "Tokens of drafts that were accepted.", "model"
        )
        self.first = self._histogram("effc_time_to_first_token_seconds", "From a request to its first token.", "model")
        self.step = self._histogram(
            "effc_time_per_token_seconds", "Between two tokens of an answer, its mean.", "model"
        )
        self.request_seconds = self._histogram("effc_request_seconds", "From a request to its end.", "model")
        self.call = self._histogram("effc_call_tokens", "Tokens in one call of the model.", "model", buckets=_SHARES)
        self.running = self._gauge("effc_requests_running", "Requests that are being answered.", "model")
        self.waiting = self._gauge("effc_requests_waiting", "Requests that wait for a place.", "model")
        self.reloads = self._counter("effc_model_reloads", "Reloads of a model by how they ended.", "model", "outcome")
        self.elastic = self._counter(
            "effc_elastic_requests", "Requests of an elastic model by the one that answers.", "model", "answered_by"
        )
        self.elastic_active = self._gauge(
            "effc_elastic_active", "Whether new requests go to the smaller model.", "model"
        )
        self.spans = self._counter("effc_spans", "Spans of requests by whether a collector took them.", "outcome")
        self._answers = self._counter("effc_http_responses", "Answers by the path and the status.", "path", "status")
        self._http = self._histogram("effc_http_response_seconds", "From the headers to the end of an answer.")

    def count_response(self, path: str, status: int, seconds: float) -> None:
        self._answers.labels(path, str(status)).inc()
        self._http.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, doc: str, *labels: str) -> Counter:
        return Counter(name, doc, labels, registry=self.registry)

    def _gauge(self, name: str, doc: str, *labels: str) -> Gauge:
        return Gauge(name, doc, labels, registry=self.registry)

    def _histogram(self, name: str, doc: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(name, doc, labels, buckets=buckets, registry=self.registry)


class ModelMetrics:
    """Metrics of one model of a server, whose queues may be several while one is emptied after a reload."""

    def __init__(self, server: Metrics, model: str):
        self.server, self._model = server, model
        for outcome in ("loaded", "refused"):
            server.reloads.labels(model, outcome)
        self._requests = {end: server.requests.labels(model, end) for end in _FINISH_REASONS}
        self.prompt_tokens, self.cached_tokens = server.prompt_tokens.labels(model), server.cached_tokens.labels(model)
        self.new_tokens, self.call = server.new_tokens.labels(model), server.call.labels(model)
        self.draft_tokens, self.accepted_tokens = (
            server.draft_tokens.labels(model),
            server.accepted_tokens.labels(model),
        )
        self.first, self.step = server.first.labels(model), server.step.labels(model)
        self._request_seconds = server.request_seconds.labels(model)
        self._seconds, self._count = 0.0, 0
        self._queues: list[Queue] = []
        self._sum_over_queues(server.running, lambda queue: queue.n_running)
        self._sum_over_queues(server.waiting, lambda queue: queue.n_waiting)

    def add_queue(self, queue: Queue) -> None:
        self._queues.append(queue)

    def remove_queue(self, queue: Queue) -> None:
        self._queues.remove(queue)

    def count_requests(self, outcome: str, count: int = 1) -> None:
        self._requests[outcome].inc(count)

    def observe_request_seconds(self, seconds: float) -> None:
        """A request was answered whole."""
        self._request_seconds.observe(seconds)
        self._seconds, self._count = self._seconds + seconds, self._count + 1

    @property
    def mean_request_s(self) -> float:
        """Seconds of a request, 0 before the first."""
        return self._seconds / max(1, self._count)

    def _sum_over_queues(self, gauge: Gauge, read: Callable[[Queue], int]) -> None:
        gauge.labels(self._model).set_function(lambda: sum(map(read, tuple(self._queues))))

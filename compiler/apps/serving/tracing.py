"""OpenTelemetry spans of requests, by its semantic conventions for generative AI; never a word of prompts or answers.

Source: https://opentelemetry.io/docs/specs/semconv/gen-ai/ ; times that it has no name for are named as vLLM does.
"""

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request as Call
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from .error_response import ErrorResponse
from .metrics import Metrics
from .request import AnswerChunk

_SETTINGS = ("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "seed")
_FLUSH_SECONDS = 1


class Tracing:
    """Spans of a server, sent to a collector in batches from a thread of their own.

    collector   URL that takes OTLP over HTTP, with or without `/v1/traces`; headers, timeouts, the sampler and the
                service's name are those of OpenTelemetry's environment variables
    """

    def __init__(self, collector: str, metrics: Metrics):
        logging.getLogger("opentelemetry").addHandler(logging.NullHandler())  # what it warns of is counted
        logging.getLogger("opentelemetry").propagate = False
        exporter = _CountedExporter(OTLPSpanExporter(traces_endpoint(collector)), metrics)
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("effc")
        self._propagator = TraceContextTextMapPropagator()

    def start(self, operation: str, request_body: Any, model: str, call: Call) -> "RequestSpan":
        """The span of a request, below that which its header `traceparent` names."""
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "effc",
            "gen_ai.request.model": request_body.model,
            "gen_ai.response.model": model,
        }
        if operation != "embeddings":
            values = {name: getattr(request_body, name) for name in _SETTINGS}
            values |= {"max_tokens": request_body.token_limit, "choice.count": request_body.n or 1}
            values["stream"] = bool(request_body.stream)
            attributes |= {f"gen_ai.request.{name}": value for name, value in values.items() if value is not None}
        context = self._propagator.extract(dict(call.headers))
        name = f"{operation} {request_body.model}"
        return RequestSpan(self._tracer.start_span(name, context, SpanKind.SERVER, attributes))

    def stop(self) -> None:
        """Send what there is, for a second at most."""
        thread = threading.Thread(target=self._provider.force_flush, name="effc-flush", daemon=True)
        thread.start()
        thread.join(_FLUSH_SECONDS)  # force_flush takes a limit and keeps to none


class RequestSpan:
    """Span of one request, which ends with the last of its choices."""

    def __init__(self, span: Span):
        self._span, self._n_choices = span, 1
        self._last_chunks: list[AnswerChunk] = []

    def set_prompt(self, n_tokens: int, n_choices: int) -> None:
        self._n_choices = n_choices
        self._span.set_attribute("gen_ai.usage.input_tokens", n_tokens)

    def end_embedding(self, n_tokens: int) -> None:
        self.set_prompt(n_tokens, 1)
        self._span.end()

    def end_choice(self, chunk: AnswerChunk) -> None:
        """Take the last chunk of a choice."""
        self._last_chunks.append(chunk)
        if len(self._last_chunks) == self._n_choices and self._span.is_recording():
            self._span.set_attributes(_usage_attributes(self._last_chunks))
            if broken := next((one.finish for one in self._last_chunks if one.error), None):
                self._set_error(broken)
            self._span.end()

    def end_with_error(self, error: Exception) -> None:
        """End the span of a request that was not answered, unless it has ended."""
        if self._span.is_recording():
            code = type(error).__name__
            if isinstance(error, ErrorResponse):
                code = error.body["error"]["code"] or str(error.status)
            self._set_error(code)
            self._span.end()

    def _set_error(self, error_type: str) -> None:
        self._span.set_attribute("error.type", error_type)
        self._span.set_status(Status(StatusCode.ERROR))


def _usage_attributes(chunks: Sequence[AnswerChunk]) -> Mapping[str, Any]:
    """Attributes of an answer: tokens, why its choices ended, and seconds of the slowest one."""
    attributes: dict[str, Any] = {
        "gen_ai.usage.output_tokens": sum(chunk.count for chunk in chunks),
        "gen_ai.usage.cache_read.input_tokens": sum(chunk.n_cached for chunk in chunks),
        "gen_ai.response.finish_reasons": [chunk.finish for chunk in chunks],
    }
    timings = [chunk.timing for chunk in chunks if chunk.timing]
    if timings:
        attributes["gen_ai.latency.time_in_queue"] = max(timing.queue_s for timing in timings)
        attributes["gen_ai.latency.time_in_model_prefill"] = max(timing.prefill_s for timing in timings)
        attributes["gen_ai.latency.time_in_model_decode"] = max(timing.decode_s for timing in timings)
        attributes["gen_ai.response.time_to_first_chunk"] = min(t.queue_s + t.prefill_s for t in timings)
    return attributes


class _CountedExporter(SpanExporter):
    """An exporter whose successes and failures are counted."""

    def __init__(self, exporter: SpanExporter, metrics: Metrics):
        self._exporter = exporter
        self._spans = {outcome: metrics.spans.labels(outcome) for outcome in ("sent", "lost")}

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        self._spans["sent" if result is SpanExportResult.SUCCESS else "lost"].inc(len(spans))
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def traces_endpoint(collector: str) -> str:
    """URL of a collector's traces. Raises ValueError where it is none of HTTP."""
    parts = urlsplit(collector)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"`{collector:.80}` is no URL of a collector, such as http://127.0.0.1:4318")
    return collector if parts.path.endswith("/v1/traces") else f"{collector.rstrip('/')}/v1/traces"


def _resource() -> Resource:
    is_named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return Resource.create({} if is_named else {SERVICE_NAME: "effc"})

"""`effc serve --otlp URL`: a span of each request at a collector, and never a word of it."""

import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import httpx
import pytest
from effc.compiler.apps.serving.error_response import ErrorResponse
from effc.compiler.apps.serving.metrics import Metrics
from effc.compiler.apps.serving.request import AnswerChunk, Timing
from effc.compiler.apps.serving.server import NetworkSettings, with_guard
from effc.compiler.apps.serving.tracing import Tracing, traces_endpoint
from effc.compiler.core import environment
from fastapi import FastAPI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from starlette.testclient import TestClient

from tests.compiler.apps.serving.conftest import serving

pytestmark = pytest.mark.slow

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SETTINGS = ("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "seed")
FAST = {"OTEL_BSP_SCHEDULE_DELAY": "100"}  # ms between batches


class Collector(BaseHTTPRequestHandler):
    bodies: list[bytes]
    paths: list[str]

    def do_POST(self):
        self.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.paths.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *words): ...


@contextmanager
def collecting():
    """A collector's class and its URL."""
    handler = type("Handler", (Collector,), {"bodies": [], "paths": []})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield handler, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def spans_of(collector, count: int) -> list:
    """Spans that came, once there are so many."""
    deadline = time.monotonic() + 30
    while True:
        requests = [ExportTraceServiceRequest.FromString(body) for body in tuple(collector.bodies)]
        spans = [s for r in requests for one in r.resource_spans for scope in one.scope_spans for s in scope.spans]
        if len(spans) >= count or time.monotonic() > deadline:
            assert len(spans) == count
            return spans
        time.sleep(0.05)


def values(span) -> dict:
    kinds = {a.key: (a.value.WhichOneof("value"), a.value) for a in span.attributes}
    return {
        key: [v.string_value for v in value.array_value.values] if kind == "array_value" else getattr(value, kind)
        for key, (kind, value) in kinds.items()
    }


def started(tracing, operation: str = "chat", traceparent: str = "", **settings):
    """Span of a request with these settings."""
    body = {**dict.fromkeys((*SETTINGS, "token_limit", "n", "stream")), "model": "large", **settings}
    return tracing.start(
        operation, SimpleNamespace(**body), "small", SimpleNamespace(headers={"traceparent": traceparent})
    )


def test_a_span_ends_with_the_last_choice_or_with_the_error_in_its_place():
    with collecting() as (collector, url):
        tracing = Tracing(url, Metrics())
        answered = started(tracing, n=2, traceparent=f"00-{TRACE}-{PARENT}-01")
        answered.set_prompt(7, 2)
        answered.end_choice(AnswerChunk("Zerubbabel", 4, "length", timing=Timing(0.125, 0.25, 0.5)))
        refused = started(tracing, traceparent="00-nonsense-01")
        refused.end_with_error(ErrorResponse(400, "Belshazzar", code="context_length_exceeded"))
        refused.end_with_error(ValueError("Nehemiah"))
        answered.end_choice(AnswerChunk("", 3, "stop", n_cached=2, timing=Timing(0.25, 0.125, 1)))
        broken = started(tracing)
        broken.end_choice(AnswerChunk("", 3, "failed", "ValueError at file.py:3"))
        started(tracing, "embeddings").end_embedding(3)
        tracing.stop()
        spans = spans_of(collector, 4)
        errors = [values(span).get("error.type") for span in spans]
        assert errors == ["context_length_exceeded", None, "failed", None]
        found = values(spans[1])
        assert (spans[1].trace_id.hex(), spans[1].parent_span_id.hex()) == (TRACE, PARENT)
        assert not spans[0].parent_span_id
        assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (7, 7)
        parts = ("time_in_queue", "time_in_model_prefill", "time_in_model_decode")
        assert [found[f"gen_ai.latency.{part}"] for part in parts] == [0.25, 0.25, 1]
        assert found["gen_ai.response.time_to_first_chunk"] == 0.375
        sent = b"".join(collector.bodies)
        assert not [word for word in (b"Zerubbabel", b"Belshazzar", b"Nehemiah", b"file.py") if word in sent]


def test_each_request_has_a_span_below_its_clients_and_no_text_of_it(artifact):
    secret = "And Zerubbabel begat"
    with collecting() as (collector, url), serving(artifact, "--otlp", url, **FAST) as server:
        body = {"model": "served", "prompt": secret, "max_tokens": 5, "temperature": 0.5, "seed": 3, "n": 2}
        body |= {"stop": ["Belshazzar"], "user": "Nehemiah"}
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "baggage": "key=Abiathar"}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60).json()
        list(server.complete(stream=True, max_tokens=3))
        wrong = server.post(prompt=secret, max_tokens=10**6)
        assert wrong.status_code == 400
        spans = spans_of(collector, 3)
        assert server.metric("effc_spans_total", outcome="sent") == 3
    assert set(collector.paths) == {"/v1/traces"}
    first, stream, refused = sorted(spans, key=lambda span: span.start_time_unix_nano)
    assert (first.trace_id.hex(), first.parent_span_id.hex(), first.kind) == (TRACE, PARENT, 2)  # 2: of a server
    assert not stream.parent_span_id and stream.trace_id != first.trace_id
    found = values(first)
    assert first.name == "text_completion served" and found["gen_ai.request.model"] == "served"
    assert found["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert found["gen_ai.usage.output_tokens"] == answer["usage"]["completion_tokens"] == 10
    assert found["gen_ai.response.finish_reasons"] == ["length", "length"]
    assert (found["gen_ai.request.temperature"], found["gen_ai.request.choice.count"]) == (0.5, 2)
    assert values(stream)["gen_ai.request.stream"] is True
    parts = ("time_in_queue", "time_in_model_prefill", "time_in_model_decode")
    seconds = [values(stream)[f"gen_ai.latency.{part}"] for part in parts]
    lasted = (stream.end_time_unix_nano - stream.start_time_unix_nano) / 1e9
    assert min(seconds) >= 0 and 0 < sum(seconds) <= lasted + 0.01  # two clocks
    assert refused.status.code == 2 and values(refused)["error.type"] == "context_length_exceeded"
    sent = b"".join(collector.bodies)
    words = [secret, "Zerubbabel", "Belshazzar", "Nehemiah", "Abiathar", *(c["text"] for c in answer["choices"])]
    assert not [word for word in words if word.encode() in sent]


def test_a_collector_that_is_away_costs_no_answer(artifact):
    quick = {**FAST, "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    with serving(artifact, "--otlp", "http://127.0.0.1:9", **quick) as server:
        assert server.complete().choices[0].text
        headers = {"traceparent": "00-nonsense-01", "tracestate": "x" * 5000}
        body = {"model": "served", "prompt": "And", "max_tokens": 1}
        assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
        deadline = time.monotonic() + 30
        while not server.metric("effc_spans_total") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert server.metric("effc_spans_total", outcome="lost") >= 1
        code, errors = server.stop()
    assert code == 130 and "Traceback" not in errors and "opentelemetry" not in errors


def test_a_collector_that_never_answers_holds_up_no_stop():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracing = Tracing(f"http://127.0.0.1:{silent.getsockname()[1]}", Metrics())
        started(tracing).end_with_error(ValueError())
        start = time.monotonic()
        tracing.stop()
        assert time.monotonic() - start < 3


def test_environment_variables_alone_send_nothing(artifact):
    with collecting() as (collector, url), serving(artifact, OTEL_EXPORTER_OTLP_ENDPOINT=url, **FAST) as server:
        server.complete()
        time.sleep(0.5)
        assert not collector.bodies


@pytest.mark.parametrize("url", ["127.0.0.1:4318", "ftp://a", "http://", "", "file:///etc/passwd"])
def test_what_is_no_url_of_a_collector_is_refused(url):
    with pytest.raises(ValueError, match="is no URL of a collector"):
        traces_endpoint(url)


def test_a_collectors_url_may_have_the_path_of_traces():
    ends = [traces_endpoint(url) for url in ("http://a:4318", "http://a:4318/", "http://a:4318/v1/traces")]
    assert set(ends) == {"http://a:4318/v1/traces"}


def test_a_missing_module_inside_a_missing_package_is_named():
    with pytest.raises(environment.Reject, match=r"needs nowhere\.sdk, not installed here"):
        environment.check_modules(["json.decoder", "nowhere.sdk"], "otel", "x")


def test_pages_that_were_named_may_send_a_trace_and_read_which_model_answers():
    network = NetworkSettings(origins=["https://page.example"])
    client = TestClient(with_guard(FastAPI(), lambda *counted: None, network))
    page = {"origin": "https://page.example"}
    wish = {"access-control-request-method": "POST", "access-control-request-headers": "traceparent, tracestate"}
    assert client.options("/v1/completions", headers={**page, **wish}).status_code == 200
    exposed = client.get("/nowhere", headers=page).headers["access-control-expose-headers"]
    assert "X-Effc-Model" in exposed and "X-Request-Id" in exposed

"""The client's side: OpenAI's chat and completions API over a guided model, with every decision told beside."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from secrets import randbits
from typing import Any

import prometheus_client as prometheus
from fastapi import FastAPI
from fastapi import Request as Call
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest

from ....dsl.syntax.diagnostics import Reject
from ...runtimes.finite_logits import REASON, logits_not_finite
from ..serving.answers import AnswerBuilder, ChatAnswer
from ..serving.body import add_text_routes
from ..serving.chat import prompt_too_long
from ..serving.error_response import ErrorResponse
from ..serving.errors import install_error_handlers, log_fault_and_client_message, traceback_location
from ..serving.guard import client_id
from ..serving.metrics import TYPE
from ..serving.protocol import ChatRequest, CompletionRequest
from ..serving.request import AnswerChunk
from ..serving.stream import require_model_name, sse_events, wait_for_disconnect
from .generation import Cancelled, Settings
from .guided import Answered, GuidedModel
from .retrieval import Unreachable

_PIECE = 24  # characters of an event: an answer is judged before it is told, so it comes whole
BRANCH = "X-Effc-Branch"


def _bytes_in_cache(client: GuidedModel, cache_name: str) -> float:
    return getattr(client, cache_name).n_bytes


class GuidedServer:
    """One guided model, and the queries that are on their way through it.

    max_waiting   queries that may wait; more are told to come back
    max_parallel  that are on their way at once; none ever has another's adapters
    """

    def __init__(self, name: str, client: GuidedModel, max_waiting: int = 16, max_parallel: int = 16):
        self.name, self.client, self._most = name, client, max_waiting + max_parallel
        self._workers = ThreadPoolExecutor(max_parallel, thread_name_prefix="effc-guided")
        self._stopped = threading.Event()
        self._buffered: Counter[str] = Counter()  # queries of each client
        self.registry = CollectorRegistry()
        self.branches = prometheus.Counter(
            "effc_queries", "Queries by the branch that answered.", ["branch"], registry=self.registry
        )
        self.hits = prometheus.Counter(
            "effc_cache_hits", "Queries that took another's state.", ["cache"], registry=self.registry
        )
        self.query_seconds = Histogram(
            "effc_query_seconds", "To answer one, waiting in the queue left out.", registry=self.registry
        )
        self.answers = prometheus.Counter(
            "effc_http_responses", "Answers by the path and the status.", ["path", "status"], registry=self.registry
        )
        for cache in ("lists", "states"):
            gauge = Gauge(f"effc_cached_{cache}_bytes", f"Bytes that cached {cache} hold.", registry=self.registry)
            gauge.set_function(partial(_bytes_in_cache, client, cache))
        Gauge(
            "effc_batch_rows", "Answers in the largest batch that PyTorch gave so far.", registry=self.registry
        ).set_function(lambda: client.batcher.largest)
        Gauge("effc_queries_held", "Queries that wait or are answered.", registry=self.registry).set_function(
            self._buffered.total
        )

    def stop(self) -> None:
        """Cancel all; caches keep their counts."""
        self._stopped.set()
        self.client.lists.flush()
        self.client.states.flush()

    def readiness_body(self) -> dict[str, Any]:
        """Refused (503) where the server stops; without samples it is ready, and says what it lacks."""
        if self._stopped.is_set():
            raise ErrorResponse(503, "the server stops", code="stopping")
        try:
            facts = self.client.refreshed_base_facts()
        except Unreachable as error:
            return {"status": "ok", "note": f"{error}; answers are direct"}
        return {"status": "ok", "version": facts.version, "samples": facts.samples}

    async def answer(self, request_body: ChatRequest | CompletionRequest, call: Call) -> Any:
        require_model_name(request_body.model, self.name)
        if unsupported := next(_unsupported_settings(request_body), None):
            raise ErrorResponse(400, f"`{unsupported}` is not supported here", unsupported, "unsupported_parameter")
        answered = await self._answer_in_thread(
            _request_messages(request_body, self.client), _settings(request_body), call
        )
        kind = ChatAnswer if isinstance(request_body, ChatRequest) else AnswerBuilder
        answer = kind(self.name, answered.prompt_tokens, self.client.prompts.tokenizer)
        headers = {BRANCH: answered.decision.branch}
        if request_body.stream:
            extension = {"effc": answered.decision.to_json()}
            return StreamingResponse(
                sse_events(answer, _answer_chunks(answered), request_body.includes_usage, extra_fields=extension),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", **headers},
            )
        answer.add(AnswerChunk(answered.text, answered.new_tokens, answered.finish))  # type: ignore[arg-type]
        return JSONResponse({**answer.response_body(False), "effc": answered.decision.to_json()}, headers=headers)

    async def _answer_in_thread(self, messages: list[dict[str, str]], settings: Settings, call: Call) -> Answered:
        if self._stopped.is_set():
            raise ErrorResponse(503, "the server stops", code="stopping")
        owner = client_id(call.scope)
        self._refuse_repeat_owner_when_full(owner)
        left = threading.Event()
        watch = asyncio.create_task(_set_on_disconnect(call, left))
        self._buffered[owner] += 1
        try:
            answered = await asyncio.get_running_loop().run_in_executor(
                self._workers, self._query, messages, settings, left
            )
        except Cancelled as cancelled:
            raise ErrorResponse(503, "the server stops", code="stopping") from cancelled
        except Reject as rejection:
            diagnostic = rejection.diagnostics[0]
            code = (
                "context_length_exceeded" if diagnostic.fault == prompt_too_long else diagnostic.slug.replace("-", "_")
            )
            if diagnostic.fault == logits_not_finite:
                raise ErrorResponse(500, REASON, code=code) from rejection
            raise ErrorResponse(400, diagnostic.message, "messages", code) from rejection
        except Exception as error:  # whatever it is, the next queries may fare better
            raise ErrorResponse(
                500, log_fault_and_client_message(call, traceback_location(error)), code="failed"
            ) from error
        finally:
            self._buffered[owner] -= 1
            self._buffered += Counter()  # those without a query are forgotten
            watch.cancel()
        decision = answered.decision
        self.branches.labels(decision.branch).inc()
        for cache, hit in (("lists", decision.list_hit), ("states", decision.adapter_hit)):
            self.hits.labels(cache).inc(int(hit))
        return answered

    def _refuse_repeat_owner_when_full(self, owner: str) -> None:
        """Refuse a query of a client that has others here, once as many wait as may; of another one never."""
        count = self._buffered.total()
        if count < self._most or not self._buffered[owner]:
            return
        seconds = max(1, min(60, 2 * count))
        raise ErrorResponse(
            429,
            f"ask again in {seconds} s: as many queries wait as may",
            code="too_many_requests",
            headers={"Retry-After": str(seconds)},
        )

    def _query(self, messages: list[dict[str, str]], settings: Settings, disconnected: threading.Event) -> Answered:
        with self.query_seconds.time():
            return self.client.answer_conversation(
                messages, settings, lambda: disconnected.is_set() or self._stopped.is_set()
            )


async def _set_on_disconnect(call: Call, disconnected: threading.Event) -> None:
    await wait_for_disconnect(call)
    disconnected.set()


def _request_messages(request_body: ChatRequest | CompletionRequest, client: GuidedModel) -> list[dict[str, str]]:
    if isinstance(request_body, ChatRequest):
        messages = [message.plain() for message in request_body.messages]
    elif len(request_body.prompt) > 1:
        raise ErrorResponse(400, f"{len(request_body.prompt)} prompts are given, and one is answered", "prompt")
    elif isinstance(prompt := request_body.prompt[0], str):
        messages = [{"role": "user", "content": prompt}]
    else:
        raise ErrorResponse(400, "the prompt is tokens, and a text is needed to look for samples", "prompt")
    if sum(len(m["content"]) for m in messages) > 64 * client.prompts.context:
        raise ErrorResponse(
            400,
            f"the model's context is {client.prompts.context} tokens, and the text is longer",
            "messages",
            "context_length_exceeded",
        )
    return messages


def _unsupported_settings(request_body: ChatRequest | CompletionRequest) -> Iterator[str]:
    """Settings of a request that the guided decoding doesn't know."""
    if request_body.alternatives is not None:
        yield "logprobs"
    if (request_body.n or 1) > 1:
        yield "n"
    if request_body.schema_or_none is not None:
        yield "response_format"
    if isinstance(request_body, ChatRequest) and request_body.call_policy:
        yield "tools"
    if isinstance(request_body, CompletionRequest) and request_body.echo:
        yield "echo"
    for name in ("logit_bias", "frequency_penalty", "presence_penalty"):
        if getattr(request_body, name):
            yield name


def _settings(request_body: ChatRequest | CompletionRequest) -> Settings:
    seed = randbits(62) if request_body.seed is None else request_body.seed
    temperature = 1.0 if request_body.temperature is None else request_body.temperature
    return Settings(request_body.token_limit or 256, temperature, request_body.top_p or 1.0, seed, request_body.stops)


async def _answer_chunks(answered: Answered) -> AsyncIterator[AnswerChunk]:
    text = answered.text
    for start in range(0, max(1, len(text)), _PIECE):
        last = start + _PIECE >= len(text)
        yield AnswerChunk(text[start : start + _PIECE], answered.new_tokens, answered.finish if last else "")  # type: ignore[arg-type]


def make_chat_application(server: GuidedServer) -> FastAPI:
    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        yield
        server.stop()

    app = FastAPI(title="effc guided", lifespan=running, docs_url=None, redoc_url=None, openapi_url=None)
    install_error_handlers(app)
    add_text_routes(app, server.answer)

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": server.name, "object": "model", "created": 0, "owned_by": "effc"}]}

    @app.get("/ready")
    async def ready() -> Any:
        return await asyncio.to_thread(server.readiness_body)

    @app.get("/health")
    async def health() -> Any:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Any:
        return Response(generate_latest(server.registry), media_type=TYPE)

    return app

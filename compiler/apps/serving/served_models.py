"""Models of one server, by the names that requests give."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fastapi import Request as Call

from .api import Service
from .daemon_thread import run_in_daemon_thread
from .elastic import MODEL_HEADER, Elastic, no_elastic
from .embeddings import EmbeddingRequest, EmbeddingService
from .error_response import ErrorResponse
from .metrics import Metrics
from .protocol import ChatRequest, CompletionRequest
from .stream import require_model_name

if TYPE_CHECKING:
    from .tracing import RequestSpan, Tracing

_LAST = 0.5  # seconds that a stopping scheduler has for its call
AnyService = Service | EmbeddingService


class ServedModels:
    """Services with different names over one registry of metrics, each of which can be exchanged while it answers.

    smaller   name of the model that answers requests of another under load, by that one's name
    tracing   that requests have spans of; None: nothing of them leaves the process
    """

    def __init__(
        self, *services: AnyService, smaller: Mapping[str, str] | None = None, tracing: "Tracing | None" = None
    ):
        assert services, "a server without a model"
        self.metrics: Metrics = services[0].metrics.server
        assert all(service.metrics.server is self.metrics for service in services), "models with metrics of their own"
        self._services = {service.name: service for service in services}
        assert len(self._services) == len(services), f"two models of {len(services)} have one name"
        self._elastic = {
            large: Elastic(self._decoder(large), self._decoder(small), self.metrics)
            for large, small in (smaller or {}).items()
        }
        self._tracing = tracing
        self._draining: list[AnyService] = []
        self._requests: Counter[AnyService] = Counter()  # that a service reads, or answers whole

    @property
    def model_names(self) -> Sequence[str]:
        return list(self._services)

    @property
    def names(self) -> Sequence[str]:
        """Names that requests may give, those of adapters among them."""
        return [name for service in self._services.values() for name in service.names]

    @property
    def are_alive(self) -> bool:
        return all(service.alive for service in self._services.values())

    def entries(self) -> list[dict[str, Any]]:
        return [s.model_entry(name) for s in self._services.values() for name in s.names]

    def entry(self, name: str) -> dict[str, Any]:
        return self._service_of(name).model_entry(name)

    def start(self) -> None:
        for service in self._services.values():
            service.start()

    def stop(self) -> None:
        """Cancel all that is answered."""
        for service in (*self._services.values(), *self._draining):
            service.stop()

    def join(self) -> None:
        for service in (*self._services.values(), *self._draining):
            service.join(_LAST)
        if self._tracing is not None:
            self._tracing.stop()

    def replace(self, service: AnyService) -> AnyService:
        """Answer new requests by a service in place of the one with its name, which is to be drained."""
        before = self._services[service.name]
        service.start()
        self._services[service.name] = service
        self._draining.append(before)
        return before

    async def drain(self, replaced: AnyService) -> None:
        """End a service that was replaced, once it has answered all that it has."""
        while self._requests[replaced]:  # not all of them are in its queue yet
            await asyncio.sleep(0.01)
        replaced.drain()
        await run_in_daemon_thread(replaced.join)
        self._draining.remove(replaced)

    async def answer_text(self, request_body: ChatRequest | CompletionRequest, call: Call) -> Any:
        service, requested = self._service_of(request_body.model), request_body
        if not isinstance(service, Service):
            raise _wrong_endpoint_error(f"`{service.name}` is an encoder: send texts to /v1/embeddings")
        headers = None
        if elastic := self._elastic.get(request_body.model):
            small = self._services[elastic.small_name]
            service = elastic.choose(service, small if isinstance(small, Service) else None)
            request_body = request_body.model_copy(update={"model": service.name})
            headers = {MODEL_HEADER: quote(service.name)}
        operation = "chat" if isinstance(request_body, ChatRequest) else "text_completion"
        with self._tracked(service), self._spanned(operation, requested, request_body.model, call) as span:
            return await service.answer_request(request_body, call, headers, span)

    async def answer_embedding(self, request_body: EmbeddingRequest, call: Call) -> Any:
        service = self._service_of(request_body.model)
        if not isinstance(service, EmbeddingService):
            raise _wrong_endpoint_error(f"`{service.name}` continues texts, and an encoder is served at /v1/embeddings")
        with self._tracked(service), self._spanned("embeddings", request_body, service.name, call) as span:
            return await service.answer_request(request_body, call, span)

    def _decoder(self, name: str) -> Service:
        service = self._services[name]
        if not isinstance(service, Service):
            raise no_elastic(f"`{name}` is an encoder", help="name models that continue texts").rejection()
        return service

    def _service_of(self, name: str) -> AnyService:
        require_model_name(name, *self.names)
        return next(service for service in self._services.values() if name in service.names)

    @contextmanager
    def _tracked(self, service: AnyService) -> Iterator[None]:
        self._requests[service] += 1
        try:
            yield
        finally:
            self._requests[service] -= 1
            if not self._requests[service]:
                del self._requests[service]

    @contextmanager
    def _spanned(self, operation: str, requested: Any, model: str, call: Call) -> "Iterator[RequestSpan | None]":
        """Span of a request, which ends with its answer, or here where there is none."""
        if self._tracing is None:
            yield None
            return
        span = self._tracing.start(operation, requested, model, call)
        try:
            yield span
        except Exception as error:
            span.end_with_error(error)
            raise


def _wrong_endpoint_error(reason: str) -> ErrorResponse:
    return ErrorResponse(404, reason, "model", "model_not_supported")

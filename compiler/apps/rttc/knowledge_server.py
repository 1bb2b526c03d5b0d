"""The server's side: a knowledge base over HTTP. It hears vectors, never a query's text, and logs neither."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from fastapi import FastAPI
from fastapi import Request as Call
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field

from ....dsl.syntax.diagnostics import Reject
from ..serving.body import parse_body
from ..serving.error_response import ErrorResponse
from ..serving.errors import install_error_handlers
from ..serving.metrics import TYPE
from .engines.index import Unreachable
from .knowledge import KnowledgeBase
from .reward import Reward

MAX_SAMPLES = 256
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


_MAX_DIFFERENCE = 0.01  # from 1, of a vector that was rounded on its way


class SampleQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")
    vector: list[float] = Field(min_length=1, max_length=65_536)
    count: int = Field(8, ge=1, le=MAX_SAMPLES)


class ScoreQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")
    question: str
    answers: Annotated[list[str], Field(min_length=1, max_length=64)]


class KnowledgeService:
    """A base that is asked; `reward` is None where the server scores nothing."""

    def __init__(self, base: KnowledgeBase, selection: str, reward: Reward | None = None):
        self.base, self.selection, self.reward = base, selection, reward
        self._scoring = threading.Lock()
        self.registry = CollectorRegistry()
        self.queries = Counter("effc_retrievals", "Lists of samples that were sent.", registry=self.registry)
        self.retrieval_seconds = Histogram(
            "effc_retrieval_seconds", "To find one list.", buckets=_SECONDS, registry=self.registry
        )
        self.answers = Counter(
            "effc_http_responses", "Answers by the path and the status.", ["path", "status"], registry=self.registry
        )

    def facts_body(self) -> dict[str, Any]:
        return {
            "version": self.base.version,
            "embedder": self.base.embedder,
            "samples": len(self.base.samples),
            "centre": [round(v, 6) for v in self.base.centre.tolist()],
        }

    def search_body(self, request_body: SampleQuery) -> dict[str, Any]:
        width = self.base.centre.numel()
        if len(request_body.vector) != width:
            raise ErrorResponse(
                400,
                f"`vector` has {len(request_body.vector)} numbers, the base's have {width}: it is of another embedder",
                "vector",
                "other_embedder",
            )
        query = torch.tensor(request_body.vector)
        if not torch.isfinite(query).all():
            raise ErrorResponse(400, "`vector` has a number too large for float32", "vector")
        if abs(float(query.double().norm()) - 1) > _MAX_DIFFERENCE:
            raise ErrorResponse(400, f"`vector` has the length {float(query.double().norm()):.3g}, not 1", "vector")
        try:
            with self.retrieval_seconds.time():
                matches = self.base.search(query, request_body.count, self.selection)
        except Unreachable as error:
            raise ErrorResponse(503, str(error), code="engine_down") from error
        self.queries.inc()
        return {
            "version": self.base.version,
            "matches": [{"sample": m.sample.to_json(), "score": round(m.score, 6)} for m in matches],
        }

    def score_answers(self, request_body: ScoreQuery) -> dict[str, Any]:
        if self.reward is None:
            message = "this server scores no answers: the reward of its folder needs the client's model"
            raise ErrorResponse(404, message, code="no_reward")
        try:
            with self._scoring:  # a scorer's adapters are on while it reads
                scores_of: Sequence[float] = self.reward.score(request_body.question, request_body.answers)
        except Reject as rejection:
            first = rejection.diagnostics[0]
            raise ErrorResponse(500, first.message, code=first.slug.replace("-", "_")) from rejection
        return {"reward": self.reward.name, "scale": self.reward.scale, "scores": list(scores_of)}


def make_knowledge_application(service: KnowledgeService) -> FastAPI:
    app = FastAPI(title="effc knowledge", docs_url=None, redoc_url=None, openapi_url=None)
    install_error_handlers(app)

    @app.post("/v1/retrieve")
    async def retrieve(call: Call) -> Any:
        request_body = await parse_body(call, SampleQuery)
        return await asyncio.to_thread(service.search_body, request_body)

    @app.post("/v1/score")
    async def score(call: Call) -> Any:
        request_body = await parse_body(call, ScoreQuery)
        return await asyncio.to_thread(service.score_answers, request_body)

    @app.get("/v1/knowledge")
    async def knowledge() -> Any:
        return service.facts_body()

    @app.get("/health")
    async def health() -> Any:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Any:
        return {"status": "ok", "version": service.base.version, "samples": len(service.base.samples)}

    @app.get("/metrics")
    async def metrics() -> Any:
        return Response(generate_latest(service.registry), media_type=TYPE)

    return app

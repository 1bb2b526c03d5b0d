"""The HTTP interface: OpenAI's routes over the models of a server, and how the server is."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi import Request as Call
from fastapi.responses import JSONResponse, Response

from .body import add_text_routes, parse_body
from .embeddings import EmbeddingRequest
from .errors import install_error_handlers
from .metrics import TYPE
from .served_models import ServedModels


def make_openai_application(served: ServedModels) -> FastAPI:
    """Routes and errors; it starts and stops the models."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        served.start()
        yield
        served.stop()
        await asyncio.to_thread(served.join)

    app = FastAPI(title="effc serve", lifespan=running, docs_url=None, redoc_url=None, openapi_url=None)
    install_error_handlers(app)
    add_text_routes(app, served.answer_text)

    @app.post("/v1/embeddings")
    async def embeddings(call: Call) -> Any:
        return await served.answer_embedding(await parse_body(call, EmbeddingRequest), call)

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": served.entries()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        return served.entry(name)

    @app.get("/health")
    async def health() -> Any:
        well = served.are_alive
        return JSONResponse({"status": "ok" if well else "stopped"}, 200 if well else 503)

    @app.get("/metrics")
    async def metrics() -> Any:
        return Response(served.metrics.text(), media_type=TYPE)

    return app

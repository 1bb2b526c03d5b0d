"""The HTTP interface: OpenAI's chat and text completions, and how the server is."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from secrets import randbits
from typing import Any

from fastapi import FastAPI
from fastapi import Request as Call
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.background import BackgroundTask

from ....dsl.syntax.diagnostics import Reject
from ....kernels.native import KernelError
from ...models.rows.chat_template import render_template
from .answers import AnswerBuilder, ChatAnswer, ErrorResponse
from .body import add_text_routes, slot
from .errors import install_error_handlers, write_down
from .guard import client_id
from .metrics import TYPE
from .protocol import ChatRequest, CompletionRequest
from .request import Piece, Request
from .scheduler import QueueFull, Scheduler, Stopped
from .stream import check_name, leaving, sse_events

_LAST = 0.5  # seconds that a stopping scheduler has for its call


class Service:
    """A model that answers under a name, and with adapters on it under `NAME:ADAPTER`."""

    def __init__(
        self,
        name: str,
        scheduler: Scheduler,
        tokenizer: Any,
        context: int,
        vocabulary: int,
        adapters: Sequence[str] = (),
    ):
        self.name, self.scheduler, self.tokenizer = name, scheduler, tokenizer
        self.adapters = {name: "", **{f"{name}:{adapter}": adapter for adapter in adapters}}
        self.context, self.vocabulary = context, vocabulary
        self.created = int(time.time())
        self._max_characters = context * max(map(len, tokenizer.get_vocab()), default=1)

    async def answer_request(self, request_body: ChatRequest | CompletionRequest, call: Call) -> Any:
        """The answer to a request, whole or as a stream."""
        check_name(request_body.model, *self.adapters)
        encode: Callable[[Any], list[int]] = (
            self._conversation_ids if isinstance(request_body, ChatRequest) else self._prompt_ids
        )
        async with slot(call, len(await call.body())):
            ids = await asyncio.to_thread(encode, request_body)
        request = replace(self._make_request(request_body, ids), owner=client_id(call.scope))
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def hear(piece: Piece) -> None:
            if piece.finish == "failed":
                piece = replace(piece, error=write_down(call, piece.error))
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        try:
            job = self.scheduler.submit(request, hear)
        except QueueFull as full:
            raise ErrorResponse(
                429,
                f"{full}: as many requests wait as may",
                code="too_many_requests",
                headers={"Retry-After": str(full.seconds)},
            ) from full
        except Stopped as stopped:
            raise ErrorResponse(503, "the server stops", code="stopping") from stopped
        except KernelError as error:  # settings that no kernel can draw by
            raise ErrorResponse(400, str(error)) from error
        answer = (ChatAnswer if isinstance(request_body, ChatRequest) else AnswerBuilder)(
            request_body.model, len(ids), self.tokenizer
        )
        if request_body.stream:
            return StreamingResponse(
                sse_events(answer, _stream(pieces), request_body.tells_usage, request_body.alternatives is not None),
                headers={"Cache-Control": "no-cache"},
                media_type="text/event-stream",
                background=BackgroundTask(self.scheduler.cancel, job),
            )
        return await self._response_when_complete(answer, request_body, pieces, call, job)

    async def _response_when_complete(
        self, answer: AnswerBuilder, request_body: Any, pieces: "asyncio.Queue[Piece]", call: Call, job: Any
    ) -> Any:
        async def leave() -> None:
            await leaving(call)
            self.scheduler.cancel(job)

        left = asyncio.create_task(leave())
        try:
            while True:
                piece = await pieces.get()
                if piece.error:
                    raise ErrorResponse(503 if piece.finish == "cancelled" else 500, piece.error, code=piece.finish)
                answer.add(piece)
                if piece.finish:
                    return JSONResponse(answer.response_body(request_body.alternatives is not None))
        finally:
            left.cancel()
            self.scheduler.cancel(job)

    # -- prompts ---------------------------------------------------------------------------------------------

    def _conversation_ids(self, request_body: ChatRequest) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ErrorResponse(
                400,
                f"the tokenizer of `{self.name}` has no chat template: ask for a completion "
                "of a text, at /v1/completions",
                "messages",
                "no_chat_template",
            )
        messages = [message.plain() for message in request_body.messages]
        if len(messages) > self.context:
            raise ErrorResponse(
                400,
                f"the model's context is {self.context} tokens, and {len(messages)} messages are more",
                "messages",
                "context_length_exceeded",
            )
        self._refuse_long_text(sum(len(message["content"]) for message in messages), "messages")
        try:
            text = render_template(self.tokenizer, messages, add_generation_prompt=True)
        except (TemplateError, ValueError) as error:
            reason = f"the model's chat template refuses these messages: {error}"
            raise ErrorResponse(400, reason, "messages") from error
        ids = self._ids(text, "messages", add_special_tokens=False)
        if not ids:
            raise ErrorResponse(400, "the chat template makes no token of these messages", "messages")
        return ids

    def _prompt_ids(self, request_body: CompletionRequest) -> list[int]:
        if not isinstance(request_body.prompt, list):
            ids = self._ids(request_body.prompt, "prompt", add_special_tokens=True)
            start = self.tokenizer.bos_token_id
            ids = ids or ([start] if start is not None else [])
        else:
            ids = request_body.prompt
        if not ids:
            raise ErrorResponse(400, "the prompt has no token", "prompt")
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            raise ErrorResponse(400, f"the prompt has tokens outside of the model's {self.vocabulary}", "prompt")
        return ids

    def _ids(self, text: str, field: str, add_special_tokens: bool) -> list[int]:
        self._refuse_long_text(len(text), field)
        try:
            return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        except Reject as rejection:
            raise ErrorResponse(400, "the model's tokenizer breaks at this text", field) from rejection

    def _refuse_long_text(self, n_characters: int, field: str) -> None:
        """Whether a text may fit: megabytes would take seconds to be found too long token by token."""
        if n_characters > self._max_characters:
            raise ErrorResponse(
                400,
                f"the model's context is {self.context} tokens, and {n_characters} characters are more",
                field,
                "context_length_exceeded",
            )

    def _make_request(self, body: ChatRequest | CompletionRequest, prompt_ids: list[int]) -> Request:
        available = self.context - len(prompt_ids)
        max_tokens = max(1, available) if body.token_limit is None else body.token_limit
        if max_tokens > available:
            raise ErrorResponse(
                400,
                f"the model's context is {self.context} tokens, and {len(prompt_ids)} of the prompt "
                f"and {max_tokens} of the answer are more",
                "messages" if isinstance(body, ChatRequest) else "prompt",
                "context_length_exceeded",
            )
        chosen: dict[str, Any] = {
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "repetition_penalty": body.repetition_penalty,
        }
        return Request(
            tuple(prompt_ids),
            max_tokens,
            stops=body.stops,
            alternatives=body.alternatives,
            adapter=self.adapters[body.model],
            seed=randbits(64) if body.seed is None else body.seed,
            **{name: value for name, value in chosen.items() if value is not None},
        )

    def model_entry(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "effc",
            "max_model_len": self.context,
            **({"parent": self.name} if name != self.name else {}),
        }


async def _stream(pieces: "asyncio.Queue[Piece]") -> AsyncIterator[Piece]:
    """Stream pieces; when the client disconnects, the response ends and cancels the job."""
    while True:
        yield await pieces.get()


def make_openai_application(service: Service) -> FastAPI:
    """Routes and errors; it starts and stops the scheduler."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        service.scheduler.stop()
        await asyncio.to_thread(service.scheduler.join, _LAST)

    app = FastAPI(title="effc serve", lifespan=running, docs_url=None, redoc_url=None, openapi_url=None)
    install_error_handlers(app)
    add_text_routes(app, service.answer_request)

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [service.model_entry(name) for name in service.adapters]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        check_name(name, *service.adapters)
        return service.model_entry(name)

    @app.get("/health")
    async def health() -> Any:
        well = service.scheduler.alive
        return JSONResponse({"status": "ok" if well else "stopped"}, 200 if well else 503)

    @app.get("/metrics")
    async def metrics() -> Any:
        return Response(service.scheduler.metrics.text(), media_type=TYPE)

    return app

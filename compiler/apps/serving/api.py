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
from ...models.rows.chat_template import render
from .answers import Answer, ChatAnswer, Refused
from .body import take_texts, turn
from .errors import tell_errors, write_down
from .metrics import TYPE
from .protocol import ChatRequest, CompletionRequest
from .request import Piece, Request
from .scheduler import Full, Scheduler, Stopped
from .stream import check_name, events, leaving

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
        self._most_characters = context * max(map(len, tokenizer.get_vocab()), default=1)

    async def answer(self, asked: ChatRequest | CompletionRequest, call: Call) -> Any:
        """The answer to a request, whole or as a stream."""
        check_name(asked.model, *self.adapters)
        encode: Callable[[Any], list[int]] = self._chat if isinstance(asked, ChatRequest) else self._prompt
        async with turn(call, len(await call.body())):
            ids = await asyncio.to_thread(encode, asked)
        key = call.scope.get("state", {}).get("key")
        request = replace(self._request(asked, ids), owner="" if key is None else f"key {key}")
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def hear(piece: Piece) -> None:
            if piece.finish == "failed":
                piece = replace(piece, error=write_down(call, piece.error))
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        try:
            job = self.scheduler.submit(request, hear)
        except Full as full:
            raise Refused(
                429,
                f"{full}: as many requests wait as may",
                code="too_many_requests",
                headers={"Retry-After": str(full.seconds)},
            ) from full
        except Stopped as stopped:
            raise Refused(503, "the server stops", code="stopping") from stopped
        except KernelError as error:  # settings that no kernel can draw by
            raise Refused(400, str(error)) from error
        answer = (ChatAnswer if isinstance(asked, ChatRequest) else Answer)(asked.model, len(ids), self.tokenizer)
        if asked.stream:
            return StreamingResponse(
                events(answer, _as_they_come(pieces), asked.tells_usage, asked.alternatives is not None),
                headers={"Cache-Control": "no-cache"},
                media_type="text/event-stream",
                background=BackgroundTask(self.scheduler.cancel, job),
            )
        return await self._whole(answer, asked, pieces, call, job)

    async def _whole(self, answer: Answer, asked: Any, pieces: "asyncio.Queue[Piece]", call: Call, job: Any) -> Any:
        async def leave() -> None:
            await leaving(call)
            self.scheduler.cancel(job)

        left = asyncio.create_task(leave())
        try:
            while True:
                piece = await pieces.get()
                if piece.error:
                    raise Refused(503 if piece.finish == "cancelled" else 500, piece.error, code=piece.finish)
                answer.add(piece)
                if piece.finish:
                    return JSONResponse(answer.whole(asked.alternatives is not None))
        finally:
            left.cancel()
            self.scheduler.cancel(job)

    # -- prompts ---------------------------------------------------------------------------------------------

    def _chat(self, asked: ChatRequest) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise Refused(
                400,
                f"the tokenizer of `{self.name}` has no chat template: ask for a completion "
                "of a text, at /v1/completions",
                "messages",
                "no_chat_template",
            )
        messages = [message.plain() for message in asked.messages]
        if len(messages) > self.context:
            raise Refused(
                400,
                f"the model's context is {self.context} tokens, and {len(messages)} messages are more",
                "messages",
                "context_length_exceeded",
            )
        self._check_length(sum(len(message["content"]) for message in messages), "messages")
        try:
            text = render(self.tokenizer, messages, add_generation_prompt=True)
        except (TemplateError, ValueError) as error:
            why = f"the model's chat template refuses these messages: {error}"
            raise Refused(400, why, "messages") from error
        ids = self._ids(text, "messages", add_special_tokens=False)
        if not ids:
            raise Refused(400, "the chat template makes no token of these messages", "messages")
        return ids

    def _prompt(self, asked: CompletionRequest) -> list[int]:
        if not isinstance(asked.prompt, list):
            ids = self._ids(asked.prompt, "prompt", add_special_tokens=True)
            start = self.tokenizer.bos_token_id
            ids = ids or ([start] if start is not None else [])
        else:
            ids = asked.prompt
        if not ids:
            raise Refused(400, "the prompt has no token", "prompt")
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            raise Refused(400, f"the prompt has tokens outside of the model's {self.vocabulary}", "prompt")
        return ids

    def _ids(self, text: str, field: str, add_special_tokens: bool) -> list[int]:
        self._check_length(len(text), field)
        try:
            return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        except Reject as refused:
            raise Refused(400, "the model's tokenizer breaks at this text", field) from refused

    def _check_length(self, characters: int, field: str) -> None:
        """Whether a text may fit: megabytes would take seconds to be found too long token by token."""
        if characters > self._most_characters:
            raise Refused(
                400,
                f"the model's context is {self.context} tokens, and {characters} characters are more",
                field,
                "context_length_exceeded",
            )

    def _request(self, asked: ChatRequest | CompletionRequest, ids: list[int]) -> Request:
        room = self.context - len(ids)
        most = max(1, room) if asked.most is None else asked.most
        if most > room:
            raise Refused(
                400,
                f"the model's context is {self.context} tokens, and {len(ids)} of the prompt "
                f"and {most} of the answer are more",
                "messages" if isinstance(asked, ChatRequest) else "prompt",
                "context_length_exceeded",
            )
        chosen: dict[str, Any] = {
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_k": asked.top_k,
            "repetition_penalty": asked.repetition_penalty,
        }
        return Request(
            tuple(ids),
            most,
            stops=asked.stops,
            alternatives=asked.alternatives,
            adapter=self.adapters[asked.model],
            seed=randbits(64) if asked.seed is None else asked.seed,
            **{name: value for name, value in chosen.items() if value is not None},
        )

    def model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "effc",
            "max_model_len": self.context,
            **({"parent": self.name} if name != self.name else {}),
        }


async def _as_they_come(pieces: "asyncio.Queue[Piece]") -> AsyncIterator[Piece]:
    """Where the reader leaves, the response ends and cancels the job."""
    while True:
        yield await pieces.get()


def application(service: Service) -> FastAPI:
    """Routes and errors; it starts and stops the scheduler."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        service.scheduler.stop()
        await asyncio.to_thread(service.scheduler.join, _LAST)

    app = FastAPI(title="effc serve", lifespan=running, docs_url=None, redoc_url=None, openapi_url=None)
    tell_errors(app)
    take_texts(app, service.answer)

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [service.model(name) for name in service.adapters]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        check_name(name, *service.adapters)
        return service.model(name)

    @app.get("/health")
    async def health() -> Any:
        well = service.scheduler.alive
        return JSONResponse({"status": "ok" if well else "stopped"}, 200 if well else 503)

    @app.get("/metrics")
    async def metrics() -> Any:
        return Response(service.scheduler.metrics.text(), media_type=TYPE)

    return app

"""OpenAI's chat and text completions over one model."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from secrets import randbits
from typing import TYPE_CHECKING, Any

from fastapi import Request as Call
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from starlette.background import BackgroundTask

from ....dsl.syntax.diagnostics import Reject
from ....kernels.native import KernelError
from ...models.rows.chat_template import render_template
from .answers import AnswerBuilder, ChatAnswer
from .body import wait_for_request_slot
from .elastic import text_fingerprint
from .error_response import ErrorResponse
from .errors import log_fault_and_client_message
from .grammar import GrammarCompiler, Matcher
from .guard import client_id
from .metrics import ModelMetrics
from .protocol import ChatRequest, CompletionRequest
from .request import AnswerChunk, Job, Request
from .scheduler import QueueFull, Scheduler, Stopped
from .stream import sse_events, wait_for_disconnect
from .text import hidden_token_texts_by_id
from .tools import END, START, CallPolicy

if TYPE_CHECKING:
    from .tracing import RequestSpan


class Service:
    """A model that answers under a name, and with adapters on it under `NAME:ADAPTER`."""

    def __init__(
        self,
        name: str,
        scheduler: Scheduler,
        tokenizer: Any,
        context_length: int,
        vocab_size: int,
        adapters: Sequence[str] = (),
    ):
        self._grammars = GrammarCompiler(tokenizer, vocab_size, scheduler.eos_ids)
        self.name, self.scheduler, self.tokenizer = name, scheduler, tokenizer
        self.adapters = {name: "", **{f"{name}:{adapter}": adapter for adapter in adapters}}
        self.context, self.vocabulary = context_length, vocab_size
        self.created = int(time.time())
        self._n_unsubmitted = 0  # requests whose prompts are cut into tokens
        self.text_fingerprint = text_fingerprint(tokenizer)
        self._hidden_marks = hidden_token_texts_by_id(tokenizer, (START, END))
        self._max_characters = context_length * max(map(len, tokenizer.get_vocab()), default=1)

    # -- life ------------------------------------------------------------------------------------------------

    @property
    def names(self) -> Sequence[str]:
        """Names that requests may give."""
        return list(self.adapters)

    @property
    def metrics(self) -> ModelMetrics:
        return self.scheduler.metrics

    @property
    def alive(self) -> bool:
        return self.scheduler.alive

    @property
    def n_slots(self) -> int:
        """Requests that are answered at once."""
        return self.scheduler.n_slots

    @property
    def capacity(self) -> int:
        """Requests that are answered or wait at most."""
        return self.scheduler.capacity

    @property
    def n_requests(self) -> int:
        """Requests that are answered or wait, those among them that have no place in the queue yet."""
        return self._n_unsubmitted + self.scheduler.n_running + self.scheduler.n_waiting

    def start(self) -> None:
        self.scheduler.start()

    def stop(self) -> None:
        """Cancel all that is answered."""
        self.scheduler.stop()

    def drain(self) -> None:
        """Take no more requests, and end once all are answered."""
        self.scheduler.drain()

    def join(self, timeout_s: float | None = None) -> None:
        self.scheduler.join(timeout_s)

    # -- answers ---------------------------------------------------------------------------------------------

    async def answer_request(
        self,
        request_body: ChatRequest | CompletionRequest,
        call: Call,
        headers: Mapping[str, str] | None = None,
        span: "RequestSpan | None" = None,
    ) -> Any:
        """The answer to a request, whole or as a stream, with these headers."""
        self._n_unsubmitted += 1
        try:
            async with wait_for_request_slot(call, len(await call.body())):
                requests = await asyncio.to_thread(self._requests, request_body, client_id(call.scope))
        finally:
            self._n_unsubmitted -= 1
        pieces: asyncio.Queue[AnswerChunk] = asyncio.Queue()
        n_prompt = sum(len(request.ids) for request in requests)
        if span is not None:
            span.set_prompt(n_prompt, len(requests) * (request_body.n or 1))
        jobs = self._submit(requests, request_body.n or 1, call, pieces, span)
        is_chat = isinstance(request_body, ChatRequest)
        answer = (ChatAnswer if is_chat else AnswerBuilder)(
            request_body.model, n_prompt, self.tokenizer, len(jobs), request_body.answer_policy if is_chat else None
        )
        cancel = partial(self._cancel, jobs)
        if request_body.stream:
            return StreamingResponse(
                sse_events(
                    answer, _queued_chunks(pieces), request_body.includes_usage, request_body.alternatives is not None
                ),
                headers={"Cache-Control": "no-cache", **(headers or {})},
                media_type="text/event-stream",
                background=BackgroundTask(cancel),
            )
        body = await self._body_when_complete(answer, request_body, pieces, call, cancel)
        return JSONResponse(body, headers=headers)

    def _submit(
        self,
        requests: Sequence[Request],
        n_choices: int,
        call: Call,
        pieces: "asyncio.Queue[AnswerChunk]",
        span: "RequestSpan | None",
    ) -> list[Job]:
        """A job for each choice of each request, whose pieces go to the queue; none where not all are taken."""
        loop = asyncio.get_running_loop()

        def hear(index: int, piece: AnswerChunk) -> None:
            if span is not None and piece.finish:
                span.end_choice(piece)
            if piece.finish == "failed":
                piece = replace(piece, error=log_fault_and_client_message(call, piece.error))
            elif piece.finish == "logits_not_finite":
                call.state.fault = piece.finish
            loop.call_soon_threadsafe(pieces.put_nowait, replace(piece, index=index))

        seeded = [replace(r, seed=(r.seed + number) % 2**64) for r, number in product(requests, range(n_choices))]
        try:
            return self.scheduler.submit_all([(r, partial(hear, index)) for index, r in enumerate(seeded)])
        except (QueueFull, Stopped, KernelError) as error:
            raise _error_response_of_refusal(error) from error

    def _cancel(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self.scheduler.cancel(job)

    async def _body_when_complete(
        self,
        answer: AnswerBuilder,
        request_body: Any,
        pieces: "asyncio.Queue[AnswerChunk]",
        call: Call,
        cancel: Callable[[], None],
    ) -> dict[str, Any]:
        async def leave() -> None:
            await wait_for_disconnect(call)
            cancel()

        left = asyncio.create_task(leave())
        try:
            while True:
                piece = await pieces.get()
                if piece.error:
                    status = {"cancelled": 503, "refused": 400}.get(piece.finish, 500)
                    raise ErrorResponse(status, piece.error, code=piece.finish)
                answer.add(piece)
                if answer.is_complete:
                    return answer.response_body(request_body.alternatives is not None)
        finally:
            left.cancel()
            cancel()

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
        policy = request_body.call_policy
        tools = [tool.plain() for tool in request_body.tools or ()] if policy else []
        n_characters = sum(len(message["content"]) + len(str(message.get("tool_calls", ""))) for message in messages)
        self._refuse_long_text(n_characters + len(str(tools)), "messages")
        variables: dict[str, Any] = {"tools": tools} if tools else {}
        try:
            text = render_template(self.tokenizer, messages, add_generation_prompt=True, **variables)
        except (TemplateError, ValueError) as error:
            reason = f"the model's chat template refuses these messages: {error}"
            raise ErrorResponse(400, reason, "messages") from error
        ids = self._tokenize_or_refuse(text, "messages", add_special_tokens=False)
        if not ids:
            raise ErrorResponse(400, "the chat template makes no token of these messages", "messages")
        return ids

    def _requests(self, body: ChatRequest | CompletionRequest, owner: str) -> list[Request]:
        """A request of each prompt. Raises ErrorResponse where none can be answered."""
        prompts = self._prompts(body)
        echoes: list[str | None] = [None] * len(prompts)
        if isinstance(body, CompletionRequest) and body.echo:
            if body.alternatives is not None and self.scheduler.needs_full_prompt(self.adapters[body.model]):
                reason = "no log-probabilities of a prompt are computed with interventions, which edit its edges"
                raise ErrorResponse(400, reason, "echo", "unsupported_parameter")
            echoes = [prompt if isinstance(prompt, str) else self._decoded(prompt) for prompt in body.prompt]
        policy = body.answer_policy if isinstance(body, ChatRequest) else None
        shared: dict[str, Any] = {
            "owner": owner,
            "grammar": self._grammar(body, policy),
            "visible": self._hidden_marks if policy and not policy.forced else {},
        }
        return [
            replace(self._make_request(body, ids), echo=echo, **shared)
            for ids, echo in zip(prompts, echoes, strict=True)
        ]

    def _grammar(self, body: ChatRequest | CompletionRequest, policy: CallPolicy | None) -> Matcher | None:
        """Grammar that an answer keeps to. Raises ErrorResponse where nothing can."""
        if policy:
            return policy.grammar(self._grammars)
        schema = body.schema_or_none
        return None if schema is None else self._grammars.of_schema(schema, "response_format")

    def _decoded(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _prompts(self, request_body: ChatRequest | CompletionRequest) -> list[list[int]]:
        """Token ids of each prompt."""
        if isinstance(request_body, ChatRequest):
            return [self._conversation_ids(request_body)]
        return [self._prompt_ids(prompt) for prompt in request_body.prompt]

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            ids = self._tokenize_or_refuse(prompt, "prompt", add_special_tokens=True)
            start = self.tokenizer.bos_token_id
            ids = ids or ([start] if start is not None else [])
        else:
            ids = prompt
        if not ids:
            raise ErrorResponse(400, "the prompt has no token", "prompt")
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            raise ErrorResponse(400, f"the prompt has tokens outside of the model's {self.vocabulary}", "prompt")
        return ids

    def _tokenize_or_refuse(self, text: str, field: str, add_special_tokens: bool) -> list[int]:
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
        bias = body.logit_bias or {}
        if outside := next((token for token in bias if not 0 <= token < self.vocabulary), None):
            raise ErrorResponse(400, f"{outside} is no token of the model, which has {self.vocabulary}", "logit_bias")
        chosen: dict[str, Any] = {
            "frequency_penalty": body.frequency_penalty,
            "presence_penalty": body.presence_penalty,
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
            bias=bias,
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


def _error_response_of_refusal(error: QueueFull | Stopped | KernelError) -> ErrorResponse:
    """The response to a request that the scheduler doesn't take."""
    if isinstance(error, QueueFull):
        reason, headers = f"{error}: as many requests wait as may", {"Retry-After": str(error.seconds)}
        return ErrorResponse(429, reason, code="too_many_requests", headers=headers)
    if isinstance(error, Stopped):
        return ErrorResponse(503, "the server stops", code="stopping")
    return ErrorResponse(400, str(error))  # settings that no kernel can draw by


async def _queued_chunks(pieces: "asyncio.Queue[AnswerChunk]") -> AsyncIterator[AnswerChunk]:
    """Stream pieces; when the client disconnects, the response ends and cancels the job."""
    while True:
        yield await pieces.get()

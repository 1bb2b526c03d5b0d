"""OpenAI's `/v1/embeddings` over an encoder: unit vectors of texts."""

import asyncio
import base64
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakValueDictionary

import torch
from fastapi import Request as Call
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, field_validator
from torch import Tensor, nn

from ....dsl.syntax.diagnostics import Reject
from ...models.rows.encoder_states import POOLINGS
from .body import wait_for_request_slot
from .error_response import ErrorResponse
from .fair_lock import FairLock
from .guard import client_id
from .metrics import Metrics, ModelMetrics

if TYPE_CHECKING:
    from .tracing import RequestSpan

MAX_INPUTS = 2048  # as OpenAI has it
_BATCH_TOKENS = 4096  # of one forward, filling included
_CLIENT_TOKENS = 1 << 20  # of a client's texts that wait to be computed, beside a first request


class EmbeddingRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str
    input: list[str] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: Any = None

    @field_validator("input", mode="before")
    @classmethod
    def as_list(cls, value: Any) -> Any:
        """A text or its tokens, or a list of either."""
        single = isinstance(value, str) or (isinstance(value, list) and value and {*map(type, value)} <= {int})
        inputs = [value] if single else value
        if not isinstance(inputs, list) or not inputs:
            raise ValueError("it is neither a text, nor tokens, nor a list of them")
        if len(inputs) > MAX_INPUTS:
            raise ValueError(f"{len(inputs)} texts are given, and at most {MAX_INPUTS} are embedded at a time")
        kinds = {*map(type, inputs)}
        if kinds != {str} and (kinds != {list} or any({*map(type, row)} != {int} for row in inputs)):
            raise ValueError("it is neither a text, nor tokens, nor a list of them")
        return inputs


class EmbeddingService:
    """An encoder that answers under a name.

    encoder     its forward gives `last_hidden_state` [b, t, width]; padding behind does not change it
    pooling     name of one of `encoder_states.POOLINGS`
    max_tokens  tokens of a text at most
    vocab_size  number of token ids
    compute_lock  shared with other models
    """

    alive = True

    def __init__(
        self,
        name: str,
        encoder: nn.Module,
        tokenizer: Any,
        pooling: str,
        max_tokens: int,
        vocab_size: int,
        metrics: ModelMetrics | None = None,
        compute_lock: FairLock | None = None,
    ):
        self.name, self.names, self.created = name, [name], int(time.time())
        self.metrics, self._compute_lock = metrics or ModelMetrics(Metrics(), name), compute_lock or FairLock()
        self._encoder, self._tokenizer, self._pooling = encoder, tokenizer, POOLINGS[pooling]
        self._length, self._vocabulary = max_tokens, vocab_size
        self._pad = tokenizer.pad_token_id or 0
        self._lock = asyncio.Lock()  # one forward at a time: it takes all threads
        self._thread = ThreadPoolExecutor(1, "effc-encoder")  # waits for other models, and no request for it
        self._clients: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tokens_of: Counter[str] = Counter()  # of each client's texts that are not answered
        self._width = 0  # of vectors

    def try_out(self) -> None:
        """One text, before anybody asks."""
        self._width = self._forward([[0]]).shape[1]

    def start(self) -> None:
        """Nothing runs between requests."""

    stop = drain = start

    def join(self, seconds: float | None = None) -> None:
        """Nothing is waited for: no request outlives the call that answers it."""

    def model_entry(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.created, "owned_by": "effc"}

    async def answer_request(
        self, request: EmbeddingRequest, call: Call, span: "RequestSpan | None" = None
    ) -> JSONResponse:
        if request.dimensions not in (None, self._width):
            reason = f"the model's vectors have {self._width} dimensions, and are not shortened"
            raise ErrorResponse(400, reason, "dimensions", "unsupported_parameter")
        async with wait_for_request_slot(call, len(await call.body())):
            rows = await asyncio.to_thread(self._rows, request.input)
        pooled = await self.embed_rows(rows, call)
        tokens = sum(map(len, rows))
        self.metrics.prompt_tokens.inc(tokens)
        if span is not None:
            span.end_embedding(tokens)
        return await asyncio.to_thread(self._response, pooled, tokens, request.encoding_format)

    async def embed_rows(self, rows: Sequence[list[int]], call: Call) -> Tensor:
        """Unit vectors [texts, width] of token ids, in a turn of the client's; ErrorResponse where it leaves."""
        batches = _batches(rows)
        async with self._wait_for_turn_of_client(client_id(call.scope), sum(map(len, rows))):
            vectors = []
            for batch in batches:
                if await call.is_disconnected():
                    raise ErrorResponse(499, "the client has left")
                vectors.append(await self._embed(batch, rows))
        order = [i for batch in batches for i in batch]
        return torch.cat(vectors)[torch.tensor(order).argsort()]

    @asynccontextmanager
    async def _wait_for_turn_of_client(self, client: str, tokens: int) -> AsyncIterator[None]:
        """A client's turn, between whose batches others' come; ErrorResponse (429) where too much of it waits."""
        if self._tokens_of[client] and self._tokens_of[client] + tokens > _CLIENT_TOKENS:
            reason = f"{self._tokens_of[client]} tokens of this client wait: send these once they are answered"
            raise ErrorResponse(429, reason, code="too_many_requests", headers={"Retry-After": "1"})
        self._tokens_of[client] += tokens
        try:
            async with self._clients.setdefault(client, asyncio.Lock()):
                yield
        finally:
            self._tokens_of[client] -= tokens
            if not self._tokens_of[client]:
                del self._tokens_of[client]

    def _response(self, vectors: Tensor, tokens: int, encoding: str) -> JSONResponse:
        """Millions of numbers are written as text, beside the event loop."""
        data = [
            {"object": "embedding", "index": i, "embedding": _encode_vector(vector, encoding)}
            for i, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": self.name, "usage": usage})

    def _rows(self, inputs: Sequence[str] | Sequence[list[int]]) -> list[list[int]]:
        """Token ids of each input. Raises ErrorResponse of those that the model can't read."""
        rows = []
        for one in inputs:
            row = self._tokens(one) if isinstance(one, str) else list(one)
            if not row:
                raise ErrorResponse(400, "a text has no token", "input")
            if len(row) > self._length:
                reason = f"the model reads {self._length} tokens, and a text has {len(row)}"
                raise ErrorResponse(400, reason, "input", "context_length_exceeded")
            if min(row) < 0 or max(row) >= self._vocabulary:
                raise ErrorResponse(400, f"a token is outside of the model's {self._vocabulary}", "input")
            rows.append(row)
        return rows

    def _tokens(self, text: str) -> list[int]:
        if len(text) > 64 * self._length:  # megabytes would take seconds to be found too long
            reason = f"the model reads {self._length} tokens, and {len(text)} characters are more"
            raise ErrorResponse(400, reason, "input", "context_length_exceeded")
        try:
            return self._tokenizer(text)["input_ids"]
        except Reject as rejection:
            raise ErrorResponse(400, "the model's tokenizer breaks at this text", "input") from rejection

    async def _embed(self, batch: Sequence[int], rows: Sequence[list[int]]) -> Tensor:
        loop = asyncio.get_running_loop()
        async with self._lock:
            try:
                vectors = await loop.run_in_executor(self._thread, self._forward, [rows[i] for i in batch])
            except Reject as rejection:  # tokens that a native artifact can't have inside of a text
                raise ErrorResponse(400, rejection.diagnostics[0].message, "input") from rejection
        if not vectors.isfinite().all():
            reason = "the model's states are NaN or infinite behind this text, so that it has no vector"
            raise ErrorResponse(500, reason, code="states_not_finite")
        return vectors

    @torch.inference_mode()
    def _forward(self, rows: Sequence[list[int]]) -> Tensor:
        """Unit vectors [b, width] float32."""
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[self._pad] * (width - len(row))] for row in rows])  # [b, t]
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        with self._compute_lock:
            states = self._encoder(input_ids=ids, attention_mask=mask)["last_hidden_state"].float()  # [b, t, width]
        return nn.functional.normalize(self._pooling(states, mask.bool()), dim=-1)


def _batches(rows: Sequence[list[int]]) -> list[list[int]]:
    """Indices of rows that are run together: of like lengths, shortest first."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and (len(batches[-1]) + 1) * len(rows[i]) > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches


def _encode_vector(vector: Tensor, encoding: str) -> list[float] | str:
    """As JSON has it, or as base64 of little-endian float32, which OpenAI's client asks for."""
    if encoding == "float":
        return vector.tolist()
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()

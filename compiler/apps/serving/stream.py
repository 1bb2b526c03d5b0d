"""Shared by all services of OpenAI's interface: names that fit, answers as events, readers that leave."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request as Call

from .answers import DONE, AnswerBuilder, server_sent_event
from .error_response import INVALID, ErrorResponse, error_body
from .request import AnswerChunk

HEARTBEAT = ": \n\n"  # a comment, which readers skip: https://html.spec.whatwg.org/multipage/server-sent-events.html
SILENCE_S = 15  # without a byte; proxies cut a connection after a minute (nginx: proxy_read_timeout)


def require_model_name(requested_name: str, *served_names: str) -> None:
    """Refused where a model of another name is asked for."""
    if requested_name not in served_names:
        those = " and ".join(f"`{one}`" for one in served_names[:8])
        if len(served_names) > 8:
            those += f" and {len(served_names) - 8} more"
        does = "does" if len(served_names) == 1 else "do"
        raise ErrorResponse(
            404, f"the model `{requested_name:.80}` does not exist, {those} {does}", "model", "model_not_found"
        )


async def sse_events(
    answer: AnswerBuilder,
    pieces: AsyncIterator[AnswerChunk],
    with_usage: bool,
    logprobs: bool = False,
    extra_fields: Mapping[str, Any] | None = None,
) -> AsyncIterator[str]:
    """An answer as server-sent events, as its pieces come. `extra_fields` are fields of the last one."""
    for chunk in answer.opening_chunks():
        yield server_sent_event(chunk)
    last_sent = time.monotonic()
    async for piece in _with_none_while_waiting(pieces):
        if piece is None:
            yield HEARTBEAT
            continue
        if piece.error:
            kind = INVALID if piece.finish == "refused" else "server_error"
            yield server_sent_event(error_body(piece.error, kind, code=piece.finish))
            return
        text = answer.add(piece)
        if text or piece.finish or (logprobs and piece.tokens):  # nothing is sent of a call that is not complete
            chunk = answer.chunk(piece, text, logprobs)
            yield server_sent_event({**chunk, **(extra_fields or {})} if piece.finish else chunk)
            last_sent = time.monotonic()
        elif time.monotonic() - last_sent > SILENCE_S:
            yield HEARTBEAT
            last_sent = time.monotonic()
        if answer.is_complete:
            break
    if with_usage:
        yield server_sent_event(answer.usage_chunk())
    yield DONE


async def _with_none_while_waiting(pieces: AsyncIterator[AnswerChunk]) -> AsyncIterator[AnswerChunk | None]:
    """Pieces, and None every SILENCE_S until the first one: while a request waits, and its prompt is read."""
    first = asyncio.ensure_future(anext(pieces, None))
    try:
        while not (await asyncio.wait({first}, timeout=SILENCE_S))[0]:
            yield None
    finally:
        first.cancel()  # without effect on one that has come
    piece = first.result()
    while piece is not None:
        yield piece
        piece = await anext(pieces, None)


async def wait_for_disconnect(call: Call) -> None:
    """Returns once the reader has left."""
    while (await call.receive())["type"] != "http.disconnect":
        pass

"""Bodies that are JSON of a known form, read where that holds up nobody, and the routes that take them."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from fastapi import FastAPI
from fastapi import Request as Call
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from .error_response import ErrorResponse
from .guard import client_id
from .protocol import ChatRequest, CompletionRequest, Unsupported
from .request_slots import RequestSlots

Form = TypeVar("Form", bound=BaseModel)

_MAX_FIELDS, _MAX_CONTAINERS, _MAX_STRINGS, _MAX_VALUES = 200, 20_000, 40_000, 1 << 18
_TOKEN = re.compile(  # a string, which may lack its end; a container's start; what stands between them
    rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]|[^"\[{]++', re.DOTALL
)
_CHOICES = {"literal['none','auto','required']"}  # of a field that has another form, which is complained of as well
_INSIDE = {"[key]", "NamedTool"}  # parts of pydantic's paths that are no fields
_slots: WeakKeyDictionary[Any, RequestSlots] = WeakKeyDictionary()  # by application


async def parse_body(call: Call, body_class: type[Form]) -> Form:
    """Parse the body of a request; ErrorResponse in OpenAI's form where it is wrong.

    A browser sends JSON to a stranger's server only after it has asked whether it may: other types are refused,
    since a page could send them unasked.
    """
    kind = call.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ErrorResponse(
            415,
            f"the body is `{kind:.60}`, and must be `application/json`"
            if kind
            else "the request has no `Content-Type: application/json`",
            code="unsupported_media_type",
        )
    body = await call.body()
    async with wait_for_request_slot(call, len(body)):
        return await asyncio.to_thread(_parse_and_validate, body, body_class)


def wait_for_request_slot(call: Call, body_bytes: int) -> AbstractAsyncContextManager[None]:
    """The turn of a request at work whose cost grows with the bytes of its body."""
    return _slots.setdefault(call.app, RequestSlots()).wait_for_slot(client_id(call.scope), body_bytes)


def add_text_routes(
    app: FastAPI, answer_request: Callable[[ChatRequest | CompletionRequest, Call], Awaitable[Any]]
) -> None:
    """Give an application the two routes that ask for texts."""

    @app.post("/v1/chat/completions")
    async def chat(call: Call) -> Any:
        return await answer_request(await parse_body(call, ChatRequest), call)

    @app.post("/v1/completions")
    async def complete(call: Call) -> Any:
        return await answer_request(await parse_body(call, CompletionRequest), call)


def _refuse_many_parts(body: bytes) -> None:
    """Refuse a body that has more lists and objects, texts and names, or values than any request: each costs memory,
    and time in which nothing else in the process runs."""
    if (
        body.count(b"[") + body.count(b"{") <= _MAX_CONTAINERS
        and body.count(b'"') <= 2 * _MAX_STRINGS
        and body.count(b",") <= _MAX_VALUES
    ):
        return
    containers = strings = values = 0
    for match in _TOKEN.finditer(body):
        if match[0].startswith(b'"'):
            strings += 1
        elif match[0] in (b"[", b"{"):
            containers += 1
        else:
            values += match[0].count(b",")
        if containers > _MAX_CONTAINERS:
            raise ErrorResponse(400, f"the body has more than {_MAX_CONTAINERS} lists and objects")
        if strings > _MAX_STRINGS:
            raise ErrorResponse(400, f"the body has more than {_MAX_STRINGS} texts and names")
        if values > _MAX_VALUES:
            raise ErrorResponse(400, f"the body has more than {_MAX_VALUES} values")


def _parse_and_validate(body: bytes, body_class: type[Form]) -> Form:
    _refuse_many_parts(body)
    try:
        parsed = from_json(body, allow_inf_nan=False, cache_strings=False)
    except ValueError as error:  # lone surrogates and bytes that are no UTF-8 too
        raise ErrorResponse(400, f"the body is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ErrorResponse(400, "the body is no JSON object")
    if len(parsed) > _MAX_FIELDS:  # each that is unknown would be complained of, and the first is told
        raise ErrorResponse(400, f"the body has {len(parsed)} fields, and no request has more than {_MAX_FIELDS}")
    try:
        return body_class.model_validate(parsed)
    except Unsupported as error:
        raise ErrorResponse(400, str(error), error.name, "unsupported_parameter") from None
    except ValidationError as error:
        raise _first_error(error) from None


def _first_error(error: ValidationError) -> ErrorResponse:
    """The first thing that is wrong. Content of a message may be a text or parts, and neither is told to be the other:
    that it is no text is skipped, and the name of the other choice is no part of a path."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    telling = [one for one in errors if one["loc"][2:] != ("content", "str") and _CHOICES.isdisjoint(one["loc"])]
    first = next(iter(telling), errors[0])
    if first["loc"][2:] == ("content", "list[Part]"):  # of another type than both
        first = {**first, "type": "content", "msg": "it is neither a text nor a list of parts"}
    is_of_parts = first["loc"][2:4] == ("content", "list[Part]")
    parts = [str(part) for part in (*first["loc"][:3], *first["loc"][3 + is_of_parts :])]
    path = ".".join(part for part in parts if part not in _INSIDE)
    message = first["msg"].removeprefix("Value error, ").replace(" after validation, not more", "")
    message = message.replace(" after validation", "")
    if first["type"] == "extra_forbidden":
        message = f"`{path:.80}` is not known here"
    elif path:
        message = f"`{path}`: {message[:1].lower()}{message[1:]}"
    return ErrorResponse(400, message, path or None)

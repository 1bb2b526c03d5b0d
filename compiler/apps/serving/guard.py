"""Middleware before the application: authentication, body limits, timeouts and the access log."""

import asyncio
import ipaddress
import re
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from starlette.responses import JSONResponse

from .access_log import AccessLog
from .error_response import ErrorResponse
from .errors import failure_message, traceback_location
from .keys import Keys
from .limits import Limits
from .rate import ErrorPace, RateLimit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_OPEN = ("/health",)  # what machines that hold no key ask
_OFTEN = ("/health", "/ready", "/metrics")  # what machines ask every few seconds
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LONGEST_PATH = 120


@dataclass(frozen=True)
class Admission:
    """Who may ask.

    rate     how often one client may ask; None: as often as it likes
    hosts    names that a Host header may give, without ports; None takes any. A page of a stranger can make a
             browser ask a server on this machine under the stranger's own name ("DNS rebinding")
    """

    keys: Keys = field(default_factory=Keys)
    hosts: Collection[str] | None = None
    rate: RateLimit | None = None

    def count_or_refuse_request(self, path: str, client: str) -> None:
        """Refused who asks too often."""
        if self.rate is not None and path not in _OFTEN:
            self.rate.count_or_refuse(client)

    def check_access_and_get_key_index(self, path: str, headers: dict[str, str]) -> int | None:
        """The number of the key; Refused who may not ask."""
        host = _host_without_port(headers.get("host", ""))
        if self.hosts is not None and host not in self.hosts:
            raise ErrorResponse(
                403,
                f"this server is not `{host:.80}`: --allow-host lets it be asked under that name",
                code="host_not_allowed",
            )
        if not self.keys or path in _OPEN:
            return None
        number = self.keys.key_index(headers.get("authorization", ""))
        if number is None:
            raise ErrorResponse(
                401,
                "the request has no key that this server knows: send `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return number


class Guard:
    """An ASGI application around another. Whatever happens inside, the answer has OpenAI's form and the log a line."""

    def __init__(
        self, app: Any, admission: Admission, limits: Limits, log: AccessLog, count: Callable[[str, int, float], None]
    ):
        self._app, self._admission, self._limits, self._log, self._count = app, admission, limits, log, count
        self._errors = ErrorPace()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        return await _Exchange(scope, receive, send, self._limits, self._errors).handle_request(
            self._app, self._admission, self._log, self._count
        )


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits, errors: ErrorPace):
        self._scope, self._receive, self._send, self._limits, self._errors = scope, receive, send, limits, errors
        self._headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        request_id = self._headers.get("x-request-id", "")
        self._id = request_id if _ID.fullmatch(request_id) else uuid4().hex
        scope.setdefault("state", {})["request"] = self._id
        self._status, self._out = 0, 0
        self._body: bytes | None = None
        self._left = False

    async def handle_request(
        self, app: Any, admission: Admission, log: AccessLog, count_response: Callable[[str, int, float], None]
    ) -> None:
        started, key, broken = time.monotonic(), None, None
        try:
            key = admission.check_access_and_get_key_index(self._scope["path"], self._headers)
            self._scope["state"]["key"] = key
            admission.count_or_refuse_request(self._scope["path"], client_id(self._scope))
            if self._scope["method"] == "POST":
                self._body = await self._read_body()
            await app(self._scope, self._receive_replayed, self._send_observed)
        except ErrorResponse as refusal:
            await self._send_refusal(refusal)
        except (_ClientLeft, TimeoutError):
            self._left = True
        except Exception as error:
            broken = traceback_location(error)
            if not self._status:
                await self._send_refusal(ErrorResponse(500, failure_message(self._id), code="internal_error"))
        finally:
            seconds = time.monotonic() - started
            self._log_response(log, key, broken, seconds)
            count_response(self._scope["path"], self._status or 499, seconds)

    def _log_response(self, log: AccessLog, key_index: int | None, broken: str | None, seconds: float) -> None:
        """A line; health and metrics, asked every few seconds, have none while all is well."""
        path, well = self._scope["path"], self._status < 400 and not broken
        if path in _OFTEN and well:
            return
        client = self._scope.get("client")
        fault = broken or self._scope.get("state", {}).get("fault")
        log.log_request(
            request=self._id,
            client=client[0] if client else None,
            method=self._scope["method"],
            path=path[:_LONGEST_PATH],
            status=self._status or None,
            ms=round(seconds * 1000, 1),
            bytes_in=len(self._body) if self._body is not None else None,
            bytes_out=self._out,
            key=key_index,
            fault=fault,
            left=True if self._left else None,
        )

    async def _read_body(self) -> bytes:
        """The body, once it is here; of one too large nothing is kept."""
        max_bytes, length = self._limits.body, self._headers.get("content-length", "")
        chunks, total = [], 0
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                if length.isdigit() and int(length) > self._limits.max_drained_bytes:
                    raise self._too_large_error()
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientLeft
                    total += len(message.get("body", b""))
                    chunks.append(message.get("body", b""))
                    if total > max_bytes:
                        chunks.clear()
                    if total > self._limits.max_drained_bytes or (total > max_bytes and not message.get("more_body")):
                        raise self._too_large_error()
                    if not message.get("more_body"):
                        return b"".join(chunks)
        except TimeoutError:
            raise ErrorResponse(
                408,
                f"the body did not come within {self._limits.body_timeout_s:g} s",
                code="timeout",
                headers={"Connection": "close"},
            ) from None

    def _too_large_error(self) -> ErrorResponse:
        return ErrorResponse(
            413,
            f"the body has more than {self._limits.body} bytes, the most that this server reads",
            code="request_too_large",
            headers={"Connection": "close"},
        )

    async def _receive_replayed(self) -> MutableMapping[str, Any]:
        """The body as one message, once, then what really comes."""
        if self._body is not None and not self._scope.get("effc.read"):
            self._scope["effc.read"] = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        message = await self._receive()
        self._left = self._left or (message["type"] == "http.disconnect" and not self._status)
        return message

    async def _send_observed(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            if 400 <= message["status"] < 500:
                await self._wait_for_turn_of_error()
            self._status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self._id.encode())]
        self._out += len(message.get("body", b""))
        async with asyncio.timeout(self._limits.body_timeout_s):  # a client that takes nothing is let go
            await self._send(message)
        await asyncio.sleep(0)  # a connection that broke is heard of here, before more is written to it

    async def _wait_for_turn_of_error(self) -> None:
        """Wait until an error may be sent, or the client is gone: a body that was read lies in memory as long."""
        seconds = self._errors.delay(client_id(self._scope))
        if self._body is None:
            return await asyncio.sleep(seconds)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._left:
                    await self._receive_replayed()
                    await asyncio.sleep(0)

    async def _send_refusal(self, refusal: ErrorResponse) -> None:
        headers = refusal.headers
        if self._scope["method"] == "POST" and self._body is None:  # the rest of it would be read for nothing
            headers = {**(headers or {}), "Connection": "close"}
        response = JSONResponse(refusal.body, refusal.status, headers)
        try:
            await response(self._scope, self._receive, self._send_observed)
        except TimeoutError:
            self._left = True


class _ClientLeft(Exception):
    """The client left before its request was whole."""


def client_id(scope: Scope) -> str:
    """Sender of a request: its key, or its address where there are no keys."""
    key = scope.get("state", {}).get("key")
    return f"key {key}" if key is not None else (scope.get("client") or ("",))[0]


def is_loopback(address: str) -> bool:
    """Whether an address of this machine can be reached from this machine alone."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _host_without_port(host: str) -> str:
    """A Host header without its port, in small letters: `[::1]:80` is `::1`."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()

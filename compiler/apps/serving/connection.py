"""A connection of uvicorn's with what it has no setting for: a time for headers, and a number of connections."""

import json
import socket
from asyncio import TimerHandle, Transport
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, NoReturn

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .error_response import error_body
from .guard import is_loopback
from .limits import Limits
from .rate import ErrorPace

_HEADER_BYTES = 64 * 1024
_HEADERS = 200
_TOO_LONG = f"the headers have more than {_HEADER_BYTES} bytes, or are more than {_HEADERS}"
_FREE_PIECES, _PIECE = 128, 256  # a body may come in so many pieces, and in one more for each so many bytes


class LimitedSocket(socket.socket):
    """A listening socket that has let in at most so many: before TLS, where uvicorn counts nobody yet."""

    max_connections: int | None = None
    _inside: "list[socket.socket] | None" = None

    def accept(self) -> tuple[socket.socket, Any]:
        connection, address = super().accept()
        self._inside = [one for one in self._inside or () if one.fileno() >= 0]
        if self.max_connections is not None and len(self._inside) >= self.max_connections:
            connection.close()
            raise BlockingIOError  # as if nobody had been there
        self._inside.append(connection)
        return connection, address


class BoundedHttp(h11.Connection):
    """HTTP whose headers, and trailers behind a body in pieces, are no longer than may be, however they came.

    h11 itself counts the bytes of what is not whole yet, and takes any length of what came whole in one piece, any
    number of headers, and bodies in any number of pieces.
    """

    _pieces = _bytes = 0
    refusal: tuple[int, str] = (400, "the request is not HTTP")  # status and message

    def next_event(self) -> Any:
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            if error.error_status_hint == 431:
                self.refusal = 431, _TOO_LONG
            raise
        if isinstance(event, (h11.Request, h11.EndOfMessage)):
            self._pieces = self._bytes = 0
            if _header_bytes(event) > _HEADER_BYTES or len(event.headers) > _HEADERS:
                self._refuse(431, _TOO_LONG)
        elif isinstance(event, h11.Data):
            self._pieces, self._bytes = self._pieces + 1, self._bytes + len(event.data)
            if self._pieces > _FREE_PIECES + self._bytes // _PIECE:
                self._refuse(413, f"the body comes in pieces of less than {_PIECE} bytes: send more at a time")
        return event

    def _refuse(self, status: int, message: str) -> NoReturn:
        self.refusal = status, message
        raise h11.RemoteProtocolError(message, error_status_hint=status)


def has_too_many_connections(address: str, addresses: Sequence[str], max_connections: int) -> bool:
    """Whether an address of another machine is more than `max_connections` times among those of all connections.

    Proxies of this machine speak for everybody.
    """
    return not is_loopback(address) and addresses.count(address) > max_connections


def _header_bytes(event: h11.Request | h11.EndOfMessage) -> int:
    """Bytes of a request's first line and headers, or of trailers, as they came but for spaces."""
    line = len(event.method) + len(event.target) + 12 if isinstance(event, h11.Request) else 0
    return line + sum(len(name) + len(value) + 4 for name, value in event.headers)  # ": " and the line's end


class UvicornConnection(H11Protocol):
    """Closed where headers don't come in time, at once where as many as may are open.

    The time runs from the first moment, or the first byte of a later request, to the end of the headers:
    bytes that trickle in don't start it again.
    """

    limits: Limits  # of the server
    errors: ErrorPace
    _is_refused = False  # a last answer waits for its turn
    _timer: TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.conn: BoundedHttp = BoundedHttp(h11.SERVER, _HEADER_BYTES)

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # TCP's, as h11's own says
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections or self._exceeds_connections_per_address():
            transport.write(_raw_error_response(503, "as many connections are open as may", "too_many_connections"))
            transport.close()
        else:
            self._restart_timer_while_open()

    def _exceeds_connections_per_address(self) -> bool:
        """Whether an address of another machine has more connections than one may."""
        clients = [getattr(other, "client", None) for other in self.connections]
        addresses = [client[0] for client in clients if client is not None]
        return self.client is not None and has_too_many_connections(
            self.client[0], addresses, self.limits.max_connections_per_address
        )

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing() or self._is_refused:
            return
        super().data_received(data)
        self._restart_timer_while_open()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.trailing_data[0]:  # the start of a next request came with this one
            self._restart_timer_while_open()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP, headers without end, or a body in too many pieces."""
        if self._is_refused:
            return
        self._is_refused = True
        self.transport.pause_reading()
        self.loop.call_later(self.errors.delay(self.client[0] if self.client else ""), self._refuse_bytes)

    def shutdown(self) -> None:
        """The server ends: a connection that was refused has no answer in progress, though h11 may wait for one."""
        if self._is_refused:
            self._refuse_bytes()
        else:
            super().shutdown()

    def _refuse_bytes(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(_raw_error_response(*self.conn.refusal, None))
            self.transport.close()

    def _restart_timer_while_open(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._cancel_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.limits.seconds, self._answer_timeout_and_close)

    def _answer_timeout_and_close(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.write(
                _raw_error_response(408, f"no whole request came in {self.limits.seconds:g} s", "timeout")
            )
            self.transport.close()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def connection_class_with_limits(limits: Limits) -> type[UvicornConnection]:
    """The class that uvicorn makes an object of for each connection."""
    return type("UvicornConnection", (UvicornConnection,), {"limits": limits, "errors": ErrorPace()})


def uvicorn_settings(limits: Limits) -> dict[str, Any]:
    """Options of uvicorn's Config."""
    return {
        "http": connection_class_with_limits(limits),
        "loop": "asyncio",  # which accepts by the socket's own method
        "ws": "none",
        "h11_max_incomplete_event_size": _HEADER_BYTES,
        "timeout_keep_alive": max(1, int(limits.seconds)),
    }


def _raw_error_response(status: int, message: str, code: str | None) -> bytes:
    """A whole answer, for where no request was read that one could belong to."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = json.dumps(error_body(message, kind, None, code)).encode()
    phrase = HTTPStatus(status).phrase
    return (
        f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode() + body

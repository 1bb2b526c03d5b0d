"""An address of this machine, and a server at it that ends when it is told to."""

import asyncio
import errno
import gc
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from ....dsl.syntax.diagnostics import Fault
from .access_log import AccessLog
from .connection import LimitedSocket, uvicorn_settings
from .elastic import MODEL_HEADER
from .guard import Admission, Guard, is_loopback
from .keys import Keys
from .limits import Limits

address_taken = Fault(
    "address-taken",
    "The address that a server was to answer at can't be used.\n\n"
    "Another program listens there, or the host is none of this machine's. `--port 0` takes a free port.",
    exit="environment",
)


open_server = Fault(
    "open-server",
    "A server without keys was to be reached from other machines.\n\n"
    "Everybody who reaches the address could use the model, and nothing that is sent is hidden from others on the "
    "way unless TLS is on. Give --api-key (or EFFC_API_KEY), best with --tls-cert and --tls-key; --insecure serves "
    "without, where the network itself keeps strangers off.",
    exit="usage",
)
bad_certificate = Fault(
    "bad-certificate",
    "The certificate or the key that a server was to use for TLS can't be read.\n\n"
    "Both are PEM files: --tls-cert holds the certificate and its chain, --tls-key the private key without a "
    "passphrase.",
    exit="usage",
)

SPARE = 32  # connections that are told that there are too many; more are closed without a word
_LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class NetworkSettings:
    """Network settings of a server.

    cert, key   PEM files for TLS, or neither
    origins     of web pages that may use it
    """

    admission: Admission = field(default_factory=Admission)
    limits: Limits = field(default_factory=Limits)
    log: AccessLog = field(default_factory=lambda: AccessLog(None))
    cert: Path | None = None
    key: Path | None = None
    origins: Sequence[str] = ()


def make_admission_or_refuse(
    listener: socket.socket, host: str, keys: Keys, allowed_hosts: Sequence[str], insecure: bool
) -> Admission:
    """Admission rules of an address; Reject an open one without a key. On this machine's own, only under its own names;
    elsewhere, only with a key."""
    if is_loopback(listener.getsockname()[0]):
        return Admission(keys, {*_LOCAL, host.lower(), *(name.lower() for name in allowed_hosts)})
    if not keys and not insecure:
        raise open_server(
            f"{host} can be reached from other machines, and there is no --api-key",
            help="`--api-key $(openssl rand -hex 24)` makes one; --insecure insists",
        ).rejection()
    return Admission(keys, {name.lower() for name in allowed_hosts} or None)


def refuse_unusable_certificate(cert: Path | None, key: Path | None) -> None:
    """Reject files that TLS could not use, before a model is loaded."""
    if cert is None and key is None:
        return
    if cert is None or key is None:
        present, missing = ("--tls-key", "--tls-cert") if cert is None else ("--tls-cert", "--tls-key")
        raise bad_certificate(f"{present} needs {missing} beside it").rejection()
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except OSError as error:  # SSLError is one
        reason = f"`{cert}` and `{key}` are no certificate and its private key: {_os_error_text(error)}"
        raise bad_certificate(reason).rejection() from error


def open_listener(host: str, port: int) -> LimitedSocket:
    """A socket at which clients may already wait; Reject where there can be none."""
    help = "stop the program that listens there, or choose another --port; 0 takes a free one"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        door = LimitedSocket(family, kind, protocol)  # asyncio sets TCP_NODELAY only where the protocol is said
    except OSError as error:
        help = "--host 127.0.0.1 is this machine alone, 0.0.0.0 all its addresses"
        raise address_taken(f"`{host}` is no host here: {_os_error_text(error)}", help=help).rejection() from error
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(address)
        door.listen()
    except OSError as error:
        door.close()
        if error.errno == errno.EADDRINUSE:
            raise address_taken(f"port {port} of {host} is in use", help=help).rejection() from error
        reason = f"port {port} of {host} can't be used: {_os_error_text(error)}"
        raise address_taken(reason, help=help).rejection() from error
    return door


def url_of(listener: socket.socket, secure: bool = False) -> str:
    host, port = listener.getsockname()[:2]
    return f"{'https' if secure else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def with_guard(app: FastAPI, count: Callable[[str, int, float], None], network: NetworkSettings) -> Any:
    """An application behind all that keeps strangers off; `count` hears the path, status and seconds of an answer."""
    known = {getattr(route, "path", "") for route in app.routes}

    def metric_path(path: str, status: int, seconds: float) -> None:
        """Paths that strangers make up are one, or they would fill the memory."""
        count(path if path in known else "other", status, seconds)

    guard = Guard(app, network.admission, network.limits, network.log, metric_path)
    if not network.origins:
        return guard
    return CORSMiddleware(
        guard,
        allow_origins=list(network.origins),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "traceparent", "tracestate"],
        expose_headers=["X-Request-Id", MODEL_HEADER],
    )


def run_until_signal(
    app: Any,
    listener: LimitedSocket,
    network: NetworkSettings,
    ready: Callable[[], None],
    stop: Callable[[], None],
    reload_on_sighup: Callable[[], None] | None = None,
) -> None:
    """Answer until a signal comes; it is raised again at the end, as KeyboardInterrupt under `effc`.

    stop     cancels all that is answered, as soon as the signal is there
    reload_on_sighup   is called on the event loop for each SIGHUP, which ends the process without it
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=1,
        ssl_certfile=network.cert,
        ssl_keyfile=network.key,
        **uvicorn_settings(network.limits),
    )
    listener.max_connections = network.limits.connections + SPARE
    with closing(listener), _short_pauses():
        try:
            _Server(config, ready, stop, reload_on_sighup, network.limits.seconds).run(sockets=[listener])
        finally:
            network.log.close()


@contextmanager
def _short_pauses() -> Iterator[None]:
    """Settings of the interpreter by which no request waits long for another.

    The model's thread and the event loop ask for the interpreter many times in each request, and wait up to a switch
    interval each time that another thread parses a large body. A garbage collection goes through every object that
    torch and transformers made at import, 0.2 s, unless they are frozen.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-4)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        sys.setswitchinterval(interval)


class _Server(uvicorn.Server):
    """Tells when it is up, and cancels all requests as soon as it is to end: they don't hold it up.

    seconds   that a client has to agree on TLS
    """

    def __init__(
        self,
        config: uvicorn.Config,
        ready: Callable[[], None],
        stop: Callable[[], None],
        reload_on_sighup: Callable[[], None] | None,
        seconds: float,
    ):
        super().__init__(config)
        self._ready, self._stop, self._reload, self._seconds = ready, stop, reload_on_sighup, seconds

    async def startup(self, sockets=None) -> None:
        if self.config.is_ssl:  # uvicorn has no setting for it, and asyncio waits for a minute
            loop = asyncio.get_running_loop()
            loop.create_server = partial(loop.create_server, ssl_handshake_timeout=self._seconds)  # type: ignore[method-assign]
        if self._reload is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig, frame) -> None:
        super().handle_exit(sig, frame)
        asyncio.get_running_loop().call_soon_threadsafe(self._stop)


def _os_error_text(error: OSError) -> str:
    return (error.strerror or str(error)).lower()

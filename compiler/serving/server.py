"""An address of this machine, and a server at it that ends when it is told to."""

import asyncio
import errno
import socket
from collections.abc import Callable
from contextlib import closing

import uvicorn

from ...dsl.diagnostics import Fault, Reject
from .api import Service, application

address_taken = Fault(
    "address-taken", "The address that a server was to answer at can't be used.\n\n"
    "Another program listens there, or the host is none of this machine's. `--port 0` takes a free port.",
    exit="environment")


def listening(host: str, port: int) -> socket.socket:
    """A socket at which clients may already wait; Reject where there can be none."""
    help = "stop the program that listens there, or choose another --port; 0 takes a free one"
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind)
    except OSError as error:
        help = "--host 127.0.0.1 is this machine alone, 0.0.0.0 all its addresses"
        raise Reject(address_taken(f"`{host}` is no host here: {_words(error)}", help=help)) from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen()
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise Reject(address_taken(f"port {port} of {host} is in use", help=help)) from error
        why = f"port {port} of {host} can't be used: {_words(error)}"
        raise Reject(address_taken(why, help=help)) from error
    return made


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(service: Service, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Answer until a signal comes; it is raised again at the end, as KeyboardInterrupt under `effc`."""
    config = uvicorn.Config(application(service), log_config=None, log_level="critical", access_log=False,
                            server_header=False, timeout_graceful_shutdown=1)
    with closing(listener):
        _Server(config, service, ready).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Tells when it is up, and cancels all requests as soon as it is to end: they don't hold it up."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]):
        super().__init__(config)
        self._service, self._ready = service, ready

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig, frame) -> None:
        super().handle_exit(sig, frame)
        asyncio.get_running_loop().call_soon_threadsafe(self._service.scheduler.stop)


def _words(error: OSError) -> str:
    return (error.strerror or str(error)).lower()

"""Requests that are parsed, rendered and counted: few at once, and large ones of one client one after the other."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from .error_response import ErrorResponse
from .limits import MIB

SMALL = 64 << 10  # bytes of a body that waits for no large one
_SMALL_AT_ONCE, _LARGE_AT_ONCE = 4, 1  # of a pool of threads that has five at least
_SMALL_OF_A_CLIENT, _LARGE_OF_A_CLIENT = 2, 1
_MAX_CLIENT_BYTES = 32 * MIB  # of large bodies that one client may have here


class RequestSlots:
    """Work before a model is asked, in threads that share one interpreter: it costs as much as a body is large."""

    def __init__(self) -> None:
        self._small, self._large = asyncio.Semaphore(_SMALL_AT_ONCE), asyncio.Semaphore(_LARGE_AT_ONCE)
        self._turns: WeakValueDictionary[tuple[str, int], asyncio.Semaphore] = WeakValueDictionary()
        self._bytes: Counter[str] = Counter()

    @asynccontextmanager
    async def wait_for_slot(self, client: str, body_bytes: int) -> AsyncIterator[None]:
        """Wait for a slot for a request of `body_bytes` bytes; ErrorResponse (429) where too many of its wait."""
        if body_bytes <= SMALL:
            async with self._slot_in_turn_of_client(client, _SMALL_OF_A_CLIENT, self._small):
                yield
            return
        if self._bytes[client] and self._bytes[client] + body_bytes > _MAX_CLIENT_BYTES:
            raise ErrorResponse(
                429,
                f"{self._bytes[client]} bytes of requests of this client wait: send this one once they are answered",
                code="too_many_requests",
                headers={"Retry-After": "1"},
            )
        self._bytes[client] += body_bytes
        try:
            async with self._slot_in_turn_of_client(client, _LARGE_OF_A_CLIENT, self._large):
                yield
        finally:
            self._bytes[client] -= body_bytes
            if not self._bytes[client]:
                del self._bytes[client]

    @asynccontextmanager
    async def _slot_in_turn_of_client(
        self, client: str, max_concurrent: int, slots: asyncio.Semaphore
    ) -> AsyncIterator[None]:
        """A slot of everybody's in one of a client's turns, which comes back after as long again as the work took.

        So a client's queue is in front of nobody else's, and others come between its requests.
        """
        turns = self._turns.setdefault((client, max_concurrent), asyncio.Semaphore(max_concurrent))
        await turns.acquire()
        loop, seconds = asyncio.get_running_loop(), 0.0
        try:
            async with slots:
                started = loop.time()
                try:
                    yield
                finally:
                    seconds = loop.time() - started
        finally:
            loop.call_later(seconds, turns.release)

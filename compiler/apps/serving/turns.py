"""Turns of a server's models at the processor: one call at a time has all threads, the next is whose turn it is."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


class ComputeTurns:
    """A lock that is passed on in the order of requests: `threading.Lock` may give it to whoever released it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._queue: deque[Lock] = deque()  # the first has the turn

    @contextmanager
    def wait_for_turn(self) -> Iterator[None]:
        gate = Lock()
        gate.acquire()
        with self._lock:
            self._queue.append(gate)
            if self._queue[0] is gate:
                gate.release()
        gate.acquire()
        try:
            yield
        finally:
            with self._lock:
                self._queue.popleft()
                if self._queue:
                    self._queue[0].release()

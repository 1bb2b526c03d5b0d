"""A lock for the models of a server, of which one at a time computes with all threads."""

from collections import deque
from threading import Lock


class FairLock:
    """A lock that threads get in the order of their requests, not whichever released it last."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._queue: deque[Lock] = deque()  # the first one's thread has the lock

    def __enter__(self) -> None:
        gate = Lock()
        gate.acquire()
        with self._lock:
            self._queue.append(gate)
            if self._queue[0] is gate:
                gate.release()
        gate.acquire()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._queue.popleft()
            if self._queue:
                self._queue[0].release()

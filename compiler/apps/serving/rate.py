"""Rate limit of a client, a token bucket, and the pace at which it hears of errors."""

import time
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

from .error_response import ErrorResponse

_MAX_KEYS = 10_000  # clients that are remembered; the one not seen for longest is forgotten, and has a full bucket then


class RateLimit:
    """
    per_minute    requests of one client: of a key, or of an address where there are no keys
    burst         that may come at once after a pause; a quarter of a minute's, one at least
    clock         seconds
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic):
        assert per_minute > 0, f"a rate is positive, not {per_minute}"
        self._each, self._clock, self._lock = per_minute / 60, clock, Lock()
        self.burst = max(1.0, per_minute / 4)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # what is left, and when it was so

    def count_or_refuse(self, client_address: str) -> None:
        """Count a request of a client; Refused (429) where it asks too often."""
        with self._lock:
            current = self._clock()
            left, before = self._buckets.pop(client_address, (self.burst, current))
            left = min(self.burst, left + (current - before) * self._each)
            self._buckets[client_address] = (left - 1 if left >= 1 else left, current)
            if len(self._buckets) > _MAX_KEYS:
                self._buckets.popitem(last=False)
        if left < 1:
            seconds = int((1 - left) / self._each) + 1
            raise ErrorResponse(
                429,
                f"ask again in {seconds} s: one client may ask {60 * self._each:g} times a minute",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(seconds)},
            )


class ErrorPace:
    """Times at which a client's errors may be sent: one every 20 ms, since a wrong request costs its sender nothing.

    None waits for more than a second: behind one address may be many who did nothing.
    """

    _SECONDS, _LONGEST = 0.02, 1.0

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._next: dict[str, float] = {}

    def delay(self, client_address: str) -> float:
        """Seconds until the next error of a client may be sent; the turn is taken."""
        current = self._clock()
        turn = min(max(current, self._next.get(client_address, 0.0)), current + self._LONGEST)
        if len(self._next) >= _MAX_KEYS:
            self._next = {name: later for name, later in self._next.items() if later > current}
        self._next[client_address] = turn + self._SECONDS
        return turn - current

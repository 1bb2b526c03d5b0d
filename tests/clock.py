"""Processor time of what is tested, not of the objects that tests before it left in the same process."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def own_time() -> Iterator[Callable[[], float]]:
    """Seconds of this process since the beginning; what was there before is not looked through for garbage meanwhile."""
    gc.collect()
    gc.freeze()
    started = time.process_time()
    try:
        yield lambda: time.process_time() - started
    finally:
        gc.unfreeze()


def until(holds: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether it holds in time: of what another process says when it comes to it."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    return holds()

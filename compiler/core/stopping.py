"""Stops from outside: whether a signal came, and what is still done before the process ends."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_requested = threading.Event()
_last_actions: list["_Once"] = []


class _Once:
    """A call that runs once; whoever comes second waits until it has ended."""

    def __init__(self, action: Callable[[], None]):
        self._action: Callable[[], None] | None = action
        self._lock = threading.RLock()

    def __call__(self) -> None:
        with self._lock:
            action, self._action = self._action, None
            if action is not None:
                action()


def request_stop() -> None:
    _requested.set()


def clear_stop_request() -> None:
    """Begin a command in a process that may have stopped another."""
    _requested.clear()


def stop_requested() -> bool:
    """Whether a signal came: what it breaks off, an import or an export, ends in quite other errors."""
    return _requested.is_set()


def raise_if_stopped() -> None:
    """Raises KeyboardInterrupt where a signal came, whatever a library has turned it into."""
    if stop_requested():
        raise KeyboardInterrupt


@contextmanager
def before_stopping(action: Callable[[], None]) -> Iterator[None]:
    """While this lasts, a stop runs an action first: here, or, if the main thread is stuck, in the watching thread."""
    last_action = _Once(action)
    _last_actions.append(last_action)
    try:
        yield
    except BaseException as error:
        if stop_requested() or isinstance(error, KeyboardInterrupt):
            last_action()
        raise
    finally:
        _last_actions.remove(last_action)


def run_last_actions() -> None:
    for last_action in _last_actions[::-1]:
        last_action()

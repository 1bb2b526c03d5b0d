"""Ctrl-C, SIGTERM and a terminal that closes end a command within a second, wherever it is.

Python runs its handlers between two bytecodes, and one call into torch may last a minute. So a thread listens
on the wake-up pipe that the signal itself writes to: it gives the main thread a moment to end well, and ends
the process otherwise. That is safe, because files of the cache and artifacts are written whole and renamed.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from ....dsl.syntax.diagnostics import EXITS
from ...core.stopping import clear_stop_request, request_stop, run_last_actions

PATIENCE = 0.7  # seconds that the main thread has to end well
SENTENCE = "stopped; nothing is half written, and the same command goes on where it was stopped"
_ANSWERING = ("run", "serve", "lsp")  # verbs that write nothing, and have nothing to go on with

_patient = threading.Event()  # set while a verb answers Ctrl-C itself
_announced = threading.Event()  # set once the main thread has told that it stops


def stop_sentence(argv: Sequence[str]) -> str:
    """Sentence that a command ends with when it is stopped."""
    return "stopped" if argv and argv[0] in _ANSWERING else SENTENCE


@contextmanager
def raise_or_exit_on_signal(sentence: str = SENTENCE) -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into KeyboardInterrupt, and end the process if nothing comes of it.

    A terminal that closes hangs up: a draft and a process that reopens it would stay behind.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    clear_stop_request()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {s: signal.signal(s, _raise_keyboard_interrupt) for s in _signals()}
    hook, sys.unraisablehook = sys.unraisablehook, _show_unless_interrupt
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_exit_some_time_after_signal, args=(reader, sentence), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)


def _signals() -> tuple[signal.Signals, ...]:
    """Signals that end a command; not a hang-up that the parent process (nohup) ignores."""
    hangup = getattr(signal, "SIGHUP", None)
    hang_up = (hangup,) if hangup and signal.getsignal(hangup) is not signal.SIG_IGN else ()
    return (signal.SIGINT, signal.SIGTERM, *hang_up)


@contextmanager
def only_raise_on_interrupt() -> Iterator[None]:
    """While this lasts, Ctrl-C only raises KeyboardInterrupt: the caller goes on after it."""
    _patient.set()
    try:
        yield
    finally:
        _patient.clear()


def _raise_keyboard_interrupt(signum: int, frame: FrameType | None) -> None:
    if signum != signal.SIGINT or not _patient.is_set():
        request_stop()
        if _imports_torch(frame):  # an exception there aborts in C++; the watch ends the process
            return
    raise KeyboardInterrupt


def _show_unless_interrupt(unraisable: "sys.UnraisableHookArgs") -> None:
    """Show what broke in a callback or a finalizer, where Python can't raise; an interrupt there is no fault, and the
    watch ends the process."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def _imports_torch(frame: FrameType | None) -> bool:
    """Whether a frame runs below the first import of torch."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "torch":
            return True
        frame = frame.f_back
    return False


def _exit_some_time_after_signal(signal_fd: int, sentence: str) -> None:
    while number := os.read(signal_fd, 1):
        if number[0] == signal.SIGINT and _patient.is_set():
            continue
        time.sleep(PATIENCE)
        with suppress(Exception):  # the process ends, whatever becomes of it
            run_last_actions()
        if not _announced.is_set():
            with suppress(OSError):  # nobody reads it
                os.write(2, f"note[interrupted]: {sentence}\n".encode())
        os._exit(EXITS["interrupted"])
    os.close(signal_fd)


def mark_stop_as_announced() -> None:
    """The main thread has printed why it ends; the watch need not."""
    _announced.set()

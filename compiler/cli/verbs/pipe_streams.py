"""stdout and stderr whose reader may leave, as `| head` does: what nobody hears ends no work and changes no code."""

import os
import sys
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import TextIO

from ...core.pipe_safe import PipeSafeStream


class ReaderLeft(BrokenPipeError):
    """Raised by a verb whose work is its words, so that it ends where nobody hears them."""


def make_streams_pipe_safe() -> None:
    """From here on both streams of this process may lose their readers. One that was closed at the start has none."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # or a file that is opened later would be written into
        pass
    os.close(number)
    sys.stdout, sys.stderr = _pipe_safe_stream(sys.stdout, 1), _pipe_safe_stream(sys.stderr, 2)


def raise_if_reader_left() -> None:
    """Raises ReaderLeft where nobody reads stdout any more."""
    raw = _raw_stdout()
    if isinstance(raw, PipeSafeStream) and raw.is_disconnected:
        raise ReaderLeft


def raise_if_stdout_was_full() -> None:
    """Raises the OSError for which stdout did not take all of an answer: a disk is full."""
    sys.stdout.flush()
    raw = _raw_stdout()
    if isinstance(raw, PipeSafeStream) and raw.full is not None:
        raise raw.full


def _raw_stdout() -> object:
    buffer = getattr(sys.stdout, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _pipe_safe_stream(stream: TextIO | None, fd: int) -> TextIO:
    if stream is None:
        return TextIOWrapper(BufferedWriter(PipeSafeStream(fd, "w", closefd=False)), "utf-8", "backslashreplace")
    buffer = getattr(stream, "buffer", None)
    if not isinstance(stream, TextIOWrapper) or type(getattr(buffer, "raw", buffer)) is not FileIO:
        return stream  # a console of Windows, or what a test reads
    stream.flush()
    spout = PipeSafeStream(fd, "w", closefd=False)
    return TextIOWrapper(
        spout if stream.write_through else BufferedWriter(spout),  # PYTHONUNBUFFERED: nothing is held back
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )

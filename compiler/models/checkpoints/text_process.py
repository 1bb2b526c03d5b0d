"""The process in which chat templates are rendered and texts tokenised: both are a model's, from anybody."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from threading import Lock
from typing import IO, Any, NamedTuple

from ....dsl.syntax.diagnostics import Fault, Reject

no_text_process = Fault(
    "no-text-process",
    "The process that renders chat templates and cuts texts into tokens doesn't start.\n\n"
    "It is the Python that runs effc, in a process of its own, which reads Python and its packages alone.",
    exit="environment",
)
CHILD = Path(__file__).with_name("text_child.py")
SECONDS, MEMORY = 3.0, 512 << 20  # of a processor, and bytes, for a request
SECONDS_PER_BYTE, MEMORY_PER_BYTE = 1e-5, 256  # more for each byte of it: ten times what texts take
_ENDING = 5.0  # seconds in which a process that closed its pipe ends
LARGE = 1 << 16  # bytes of a request that goes to a second process, so that small ones don't wait for it


class LimitExceeded(Exception):
    """Work that takes more time or memory than a text of its length may."""


class ProcessReply(NamedTuple):
    fields: dict[str, Any]
    attached: bytes


class TextProcess:
    """A process that works for this one: begun at the first request, and again after one that ended it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None  # a file: a pipe that nobody reads would stop the child when it is full

    def request(self, kind: str, arguments: Mapping[str, Any], attached: bytes = b"") -> ProcessReply:
        """Answer to a request, and the bytes behind it. Raises LimitExceeded where the kernel ended the process, Reject
        (no-text-process) where it doesn't start, and TypeError for texts that are none."""
        text = json.dumps(arguments, default=str if kind == "render" else None)
        size = len(text) + len(attached)
        seconds, memory = SECONDS + SECONDS_PER_BYTE * size, MEMORY + MEMORY_PER_BYTE * size
        head = json.dumps({"kind": kind, "seconds": seconds, "memory": memory, "attached": len(attached)})
        with self._lock:
            return self._exchange(f"{head}\n{text}\n".encode() + attached, seconds, memory)

    def _exchange(self, message: bytes, seconds: float, memory_bytes: int) -> ProcessReply:
        if self._process and self._process.poll() is not None:  # ended by somebody else since the last text
            self._end_and_exit_code()
        process = self._process or self._start_child()
        assert process.stdin and process.stdout, "both are pipes"
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(message)
                process.stdin.flush()
            answer = process.stdout.readline(memory_bytes)
            fields = json.loads(answer) if answer.endswith(b"\n") else {"attached": memory_bytes + 1}
            size = fields.pop("attached")
            body = process.stdout.read(size) if size <= memory_bytes else None
        except BaseException:  # Ctrl-C: the answer would be taken for the next one
            self._end_and_exit_code()
            raise
        if body is not None and len(body) == size:
            return ProcessReply(fields, body)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_ENDING)  # its pipe closes before it ends, and a signal of ours would hide its own end
        code = self._end_and_exit_code()
        if code >= 0:
            assert self._errors is not None, "it was started"
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").split("\n")
            raise _start_failure(next(filter(None, reversed(lines)), f"it ended with exit code {code}"))
        raise LimitExceeded(f"it takes more than {seconds:.2g} s or more memory than there is for it (signal {-code})")

    def _end_and_exit_code(self) -> int:
        """End the process; its exit code, which is that of its own end where it had ended before."""
        process, self._process = self._process, None
        assert process and process.stdin, "it was started"
        process.kill()
        with suppress(BrokenPipeError):
            process.stdin.close()
        return process.wait()

    def _start_child(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-P", str(CHILD)]
        try:
            self._errors = TemporaryFile()  # noqa: SIM115  # as long as the process
            self._process = process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,  # of its start: it lets go of it when its libraries are there
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C stops an answer, and not what the next one needs
            )
        except (OSError, TypeError) as error:  # there may be no file of Python's
            raise _start_failure(str(error)) from error
        return process


def _start_failure(reason: str) -> Reject:
    message = f"the process that cuts texts into tokens doesn't start: {reason}"
    command = " ".join(map(str, (sys.executable, "-P", "-c", "'import transformers'")))
    return no_text_process(message, help=f"see whether this runs: {command}").rejection()


_processes: dict[tuple[int, bool], TextProcess] = {}


def text_process(request_bytes: int) -> TextProcess:
    """The process of requests of so many bytes; one that was forked off this one has processes of its own."""
    return _processes.setdefault((os.getpid(), request_bytes > LARGE), TextProcess())

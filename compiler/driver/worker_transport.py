"""Transports of lines of JSON to workers, which answer with lines and may be lost; and one of local processes."""

import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from select import select

WORKER = "effc.compiler.driver.workers"


class WorkerTransport(ABC):
    """Transport to a number of workers, each with an index from 0. A worker has one message at a time to answer."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Maximum number of workers; their addresses are resolved at the first call."""

    @abstractmethod
    def start_worker(self, index: int) -> None:
        """Start a worker at an index that has none."""

    @abstractmethod
    def send(self, index: int, line: str) -> None:
        """Send a line to a worker that has answered all before it."""

    @abstractmethod
    def receive(self, timeout_s: float) -> Sequence[tuple[int, str, bool]]:
        """Answers (index, line, True) and lost workers (index, reason, False), as soon as there are some.

        Waits `timeout_s` at most; empty where none came.
        """

    @abstractmethod
    def stop_worker(self, index: int) -> None:
        """Kill a worker that may hang; nothing is received of it from then on."""

    def is_stopped(self, index: int) -> bool:
        """Whether a signal has suspended a worker; false where that can't be read."""
        return False

    @abstractmethod
    def end(self) -> None:
        """Kill all workers."""


@dataclass
class LocalProcesses(WorkerTransport):
    """Processes of this machine, with pipes. They end by themselves when whoever asks has ended, however that was."""

    count: int
    threads: int
    workers: dict[int, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    buffers: dict[int, bytes] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.count

    def start_worker(self, index: int) -> None:
        env = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))}
        self.workers[index] = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the one who asks
        )
        self.buffers[index] = b""

    def send(self, index: int, line: str) -> None:
        pipe = self.workers[index].stdin
        assert pipe is not None
        with suppress(BrokenPipeError):  # `receive` tells that it was lost
            pipe.write(line.encode() + b"\n")
            pipe.flush()

    def receive(self, timeout_s: float) -> list[tuple[int, str, bool]]:
        pipes = {w.stdout.fileno(): index for index, w in self.workers.items() if w.stdout}
        replies = []
        for number in select(list(pipes), [], [], timeout_s)[0]:
            index = pipes[number]
            part = os.read(number, 1 << 16)
            if not part:
                replies.append((index, _kill_and_get_reason(self.workers.pop(index)), False))
                continue
            *lines, self.buffers[index] = (self.buffers[index] + part).split(b"\n")
            replies += [(index, line.decode(), True) for line in lines]
        return replies

    def stop_worker(self, index: int) -> None:
        worker = self.workers.pop(index)
        worker.kill()
        _close_pipes(worker)
        with suppress(subprocess.TimeoutExpired):  # one that hangs in the kernel ends when that lets it
            worker.wait(1.0)

    def is_stopped(self, index: int) -> bool:
        try:
            stat = Path(f"/proc/{self.workers[index].pid}/stat").read_text()
        except OSError:  # another system, or it has just ended
            return False
        return stat.rpartition(")")[2].split()[:1] == ["T"]  # proc(5): stopped by a signal

    def end(self) -> None:
        for worker in self.workers.values():
            worker.kill()
            worker.wait()
            _close_pipes(worker)
        self.workers.clear()


def _close_pipes(worker: "subprocess.Popen[bytes]") -> None:
    for pipe in (worker.stdin, worker.stdout):
        if pipe:
            with suppress(BrokenPipeError):
                pipe.close()


def _kill_and_get_reason(worker: "subprocess.Popen[bytes]") -> str:
    worker.kill()  # one that closed its answers and lives on is of no use
    code = worker.wait()
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with {code}"

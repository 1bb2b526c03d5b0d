"""Fresh processes without the seconds that importing transformers takes: one imports, and forks for each job.

The process that imports is `verify_child.py --nursery`: it has seen no folder and nothing of effc, and each job is a
fork of it, so what a job does is seen by no other. Linux alone forks safely with torch loaded; elsewhere a job is a
process from the start.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from select import select
from threading import Lock

CHILD = Path(__file__).with_name("verify_child.py")
IDLE = 60.0  # seconds without a job, after which a nursery ends: it holds what its imports take
READ_WHEN_IMPORTED = ("HF_", "TRANSFORMERS_", "TORCH", "OMP_", "MKL_", "PYTHON", "LD_", "XDG_", "PATH", "HOME")


@dataclass(frozen=True)
class JobResult:
    """returncode   as `subprocess` has it: negative for a signal"""

    returncode: int
    stderr: str


class ForkServer:
    """A process that forks one for each job, for one environment of its imports."""

    def __init__(self, env: dict[str, str]):
        self.owner, self.imported = os.getpid(), _import_variables(env)
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(CHILD), "--nursery", str(IDLE)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # ended as a group, jobs included
        )

    def serves(self, env: dict[str, str]) -> bool:
        """A fork of this process has no nursery of its own yet; one that idled has ended."""
        return self.owner == os.getpid() and self.process.poll() is None and self.imported == _import_variables(env)

    def run_job(
        self,
        arguments: list[str],
        env: dict[str, str],
        timeout_s: float,
        on_poll: Callable[[bool], None] = lambda started: None,
    ) -> JobResult:
        """Raises TimeoutExpired, and BrokenPipeError where it had just ended.

        on_poll   is called every second until the job is done, with whether it has begun
        """
        assert self.process.stdin and self.process.stdout
        with tempfile.TemporaryDirectory(prefix="effc-job-") as folder:
            stderr_file = Path(folder, "stderr")
            job = {"arguments": arguments, "env": env, "cwd": os.getcwd(), "stderr": str(stderr_file)}
            try:
                self.process.stdin.write(json.dumps(job).encode() + b"\n")
                self.process.stdin.flush()
                end = time.monotonic() + timeout_s
                while not select([self.process.stdout], [], [], max(0.0, min(1.0, end - time.monotonic())))[0]:
                    if time.monotonic() >= end:
                        raise subprocess.TimeoutExpired("verify_child.py", timeout_s)
                    on_poll(stderr_file.exists())
                answer = self.process.stdout.readline()
            except BaseException:
                self.end()
                raise
            text = stderr_file.read_text(errors="replace") if stderr_file.exists() else ""
            if not answer and self.process.wait() == 0:
                raise BrokenPipeError("it idled, and ended with our word unread")
            return JobResult(int(answer) if answer else -abs(self.process.wait()), text)

    def end(self) -> None:
        if self.owner == os.getpid() and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _import_variables(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(READ_WHEN_IMPORTED)}


_nursery: ForkServer | None = None  # one for this process; it ends when idle, or with us
_asking = Lock()  # one job at a time: each wants the memory of a second copy


def run_verify_child(
    arguments: list[str], env: dict[str, str], timeout_s: float, on_poll: Callable[[bool], None] = lambda started: None
) -> JobResult:
    """Run `verify_child.main` with these arguments in a fresh process. Raises TimeoutExpired."""
    global _nursery
    if sys.platform != "linux":
        command = [sys.executable, "-P", str(CHILD), *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)
        return JobResult(done.returncode, done.stderr)
    with _asking:
        if _nursery is None or not _nursery.serves(env):
            if _nursery is not None:
                _nursery.end()
            _nursery = ForkServer(env)
        try:
            return _nursery.run_job(arguments, env, timeout_s, on_poll)
        except BrokenPipeError:  # it idled, and ended between our look and our word
            _nursery = ForkServer(env)
            return _nursery.run_job(arguments, env, timeout_s, on_poll)

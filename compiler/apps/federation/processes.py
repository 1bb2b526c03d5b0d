"""Processes that outlive the command that started them: known by id and start, so that no other is ever ended."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ....dsl.syntax.diagnostics import Reject
from ....dsl.syntax.json_types import make_range_predicate
from ...core.process_start import process_start_text
from ...core.safe_read import open_regular

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # Flower's logs have it, whoever reads them
GRACE = 10.0  # seconds between asking a process to end and ending it


@dataclass(frozen=True)
class Process:
    """`started` is what the system says of its start: an id may be another process's by now."""

    name: str
    pid: Annotated[int, make_range_predicate(2, 1 << 31)]  # 0 and less are groups, which a signal would go to
    started: str
    log: str

    @property
    def is_alive(self) -> bool:
        return self.started != "" and self.started == process_start_text(self.pid)


def start_process(name: str, command: Sequence[str], env: Mapping[str, str], log_folder: Path) -> Process:
    """A process in a session of its own, whose output goes to `NAME.log` in the folder. Raises OSError for a link."""
    log = log_folder / f"{name}.log"
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644), "ab") as out:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=log_folder,
            env=dict(env),
            start_new_session=True,
        )
    return Process(name, process.pid, process_start_text(process.pid), str(log))


def terminate_live_processes(processes: Sequence[Process]) -> list[str]:
    """Ask all to end, then end what is left, each with its own children; the names of those that lived."""
    living = [p for p in processes if p.is_alive]
    for process in living:
        _signal(process, signal.SIGTERM)
    until = time.monotonic() + GRACE
    while time.monotonic() < until and any(p.is_alive for p in living):
        _reap(living)
        time.sleep(0.1)
    for process in living:
        _signal(process, signal.SIGKILL)  # what is left of its session
    _reap(living)
    return [p.name for p in living]


def _signal(process: Process, signum: int) -> None:
    """To the session that the process began: it and what it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signum)


def _reap(processes: Sequence[Process]) -> None:
    for process in processes:
        with contextlib.suppress(ChildProcessError):  # another command's child
            os.waitpid(process.pid, os.WNOHANG)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def is_port_in_use(port: int) -> bool:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def accepts_connections(port: int) -> bool:
    with socket.socket() as one:
        one.settimeout(1.0)
        return one.connect_ex(("127.0.0.1", port)) == 0


def last_log_line(log_path: str) -> str:
    """Last line of a process's log file."""
    try:
        with open_regular(Path(log_path)) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4000))
            lines = file.read(4000).decode(errors="replace").strip().splitlines()
    except (OSError, Reject):
        return ""
    return _COLOUR.sub("", lines[-1]).strip() if lines else ""

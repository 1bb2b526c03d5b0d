"""Workers that `--workers` names."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...dsl.syntax.diagnostics import Fault, Reject
from ..core.environment import check_modules
from ..core.settings import Settings
from .worker_team import Team, facts
from .worker_transport import Processes, WorkerTransport

if TYPE_CHECKING:
    from .api import Session

unknown_workers = Fault(
    "unknown-workers",
    "`--workers` says what no workers are.\n\n"
    "A number starts so many processes on this machine, `ray` a cluster of Ray's here, `ray:HOST:PORT` joins one.",
    exit="usage",
)
MAX_WORKERS = 1024
PORTS = range(1, 1 << 16)


def parse_workers_option(option: str) -> int | str:
    """Number of processes, or the address of a cluster, "" for a local one; parses the text alone.

    Raises Reject (unknown-workers) for other words, and (package-missing) for a cluster without Ray.
    """
    if re.fullmatch(r"[0-9]{1,4}", option) and 1 <= int(option) <= MAX_WORKERS:
        return int(option)
    kind, colon, address = option.partition(":")
    if kind != "ray" or (colon and not address):
        raise Reject(
            unknown_workers(
                f"`--workers {option}` is neither a number from 1 to {MAX_WORKERS} nor a cluster"
                if option
                else "`--workers` is given nothing",
                help="write `--workers 2`, `--workers ray` or `--workers ray:HOST:PORT`",
            )
        )
    host, _, port = address.rpartition(":")
    if address and not (host and re.fullmatch(r"[0-9]{1,5}", port) and int(port) in PORTS):
        raise Reject(
            unknown_workers(
                f"`--workers {option}` names no host and port",
                help="write the address that `ray start --head` prints, such as ray:10.0.0.5:6379",
            )
        )
    check_modules(("ray",), "ray", f"`--workers {option}`")
    return address


def make_transport(settings: Settings) -> WorkerTransport:
    """Raises Reject as `parse_workers_option` does, and where no cluster answers."""
    option = parse_workers_option(settings.workers)
    if isinstance(option, int):
        return Processes(option, settings.threads or 1)
    from .ray_workers import Actors

    return Actors(option, settings.threads or 1)


@contextmanager
def worker_team(session: "Session", transport: WorkerTransport | None) -> Iterator[Team | None]:
    """The workers of a compile, let go afterwards."""
    settings = session.settings
    if transport is None:
        yield None
        return
    session_facts = {
        "recipe": str(session.path.resolve()),
        "set": dict(session.set) if isinstance(session.set, Mapping) else list(session.set),
        "params": str(session.params.resolve()) if session.params else "",
        "settings": {
            "cache_dir": str(settings.cache_dir.resolve()),
            **{name: getattr(settings, name) for name in ("seed", "device", "offline", "trust_remote_code", "threads")},
        },
    }
    team = Team(transport, settings, session.run, session_facts, facts())
    try:
        yield team
    finally:
        team.end()

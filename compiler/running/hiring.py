"""Which workers `--workers` names."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...dsl.diagnostics import Fault, Reject
from ..machine.environment import check_modules
from ..words.context import Settings
from .hands import Hands, Processes
from .team import Team, facts

if TYPE_CHECKING:
    from ..api import Session

unknown_workers = Fault(
    "unknown-workers",
    "`--workers` says what no workers are.\n\n"
    "A number starts so many processes on this machine, `ray` a cluster of Ray's here, `ray:HOST:PORT` joins one.",
    exit="usage",
)
MOST = 1024


def hands_of(settings: Settings) -> Hands:
    """Raises Reject (unknown-workers) for other words, and what keeps a cluster from being joined."""
    asked = settings.workers
    if re.fullmatch(r"\d{1,4}", asked) and 1 <= int(asked) <= MOST:
        return Processes(int(asked), settings.threads or 1)
    kind, _, address = asked.partition(":")
    if kind != "ray" or (":" in asked and not address):
        raise Reject(
            unknown_workers(
                f"`--workers {asked}` is neither a number from 1 to {MOST} nor a cluster",
                help="write `--workers 2`, `--workers ray` or `--workers ray:HOST:PORT`",
            )
        )
    check_modules(("ray",), "ray", f"`--workers {asked}`")
    from .cluster import Actors

    return Actors(address, settings.threads or 1)


@contextmanager
def working(session: "Session", hands: Hands | None) -> Iterator[Team | None]:
    """The workers of a compile, let go afterwards."""
    settings = session.settings
    if hands is None:
        yield None
        return
    told = {
        "recipe": str(session.path.resolve()),
        "set": dict(session.set) if isinstance(session.set, Mapping) else list(session.set),
        "params": str(session.params.resolve()) if session.params else "",
        "settings": {
            "cache_dir": str(settings.cache_dir.resolve()),
            **{name: getattr(settings, name) for name in ("seed", "device", "offline", "trust_remote_code", "threads")},
        },
    }
    team = Team(hands, settings, told, facts())
    try:
        yield team
    finally:
        team.end()

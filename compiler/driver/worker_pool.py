"""Workers that `--workers` names."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...dsl.syntax.diagnostics import Fault
from ..core.environment import check_modules
from ..core.options import OptionError, parse_worker_source
from ..core.settings import Settings
from .worker_team import Team, worker_environment_facts
from .worker_transport import LocalProcesses, WorkerTransport

if TYPE_CHECKING:
    from .api import Session

unknown_workers = Fault(
    "unknown-workers",
    "`--workers` says what no workers are.\n\n"
    "A number starts so many processes on this machine, `ray` a cluster of Ray's here, `ray:HOST:PORT` joins one.",
    exit="usage",
)


def parse_workers_option(option: str) -> int | str:
    """Workers as `parse_worker_source` reads them.

    Raises Reject (unknown-workers) for other words, and (package-missing) for a cluster without Ray.
    """
    try:
        workers = parse_worker_source(option)
    except OptionError as error:
        problem = f"`--workers {option}` {error.fact}" if option else "`--workers` is given nothing"
        raise unknown_workers(problem, help=error.remedy).rejection() from error
    if isinstance(workers, str):
        check_modules(("ray",), "ray", f"`--workers {option}`")
    return workers


def make_transport(settings: Settings) -> WorkerTransport:
    """Raises Reject as `parse_workers_option` does, and where no cluster answers."""
    option = parse_workers_option(settings.workers)
    if isinstance(option, int):
        return LocalProcesses(option, settings.threads or 1)
    from .ray_workers import RayTransport

    return RayTransport(option, settings.threads or 1)


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
    team = Team(transport, settings, session.run, session_facts, worker_environment_facts())
    try:
        yield team
    finally:
        team.end()

"""Models of a server that are opened again while it answers, as their files are now."""

import asyncio
from collections.abc import Callable

from ....dsl.syntax.diagnostics import Reject
from .access_log import AccessLog
from .daemon_thread import run_in_daemon_thread
from .errors import traceback_location
from .served_models import AnyService, ServedModels


class Reloader:
    """Opens all models again, one after the other; a model that doesn't open goes on as it was.

    open_service   the model of a name, from its files; runs beside the event loop
    """

    def __init__(self, served: ServedModels, open_service: Callable[[str], AnyService], log: AccessLog):
        self._served, self._open_service, self._log = served, open_service, log
        self._is_requested = False
        self._reload: asyncio.Task[None] | None = None
        self._drains: set[asyncio.Task[None]] = set()

    def request(self) -> None:
        """Open all models again; once more where that goes on already, since files may have changed meanwhile."""
        self._is_requested = True
        if self._reload is None or self._reload.done():
            self._reload = asyncio.get_running_loop().create_task(self._reload_while_requested())

    async def _reload_while_requested(self) -> None:
        while self._is_requested:
            self._is_requested = False
            for name in self._served.model_names:
                await self._reload_model(name)

    async def _reload_model(self, name: str) -> None:
        reason = None
        try:
            service = await run_in_daemon_thread(self._open_service, name)
        except Reject as rejection:
            reason = "; ".join(diagnostic.message for diagnostic in rejection.diagnostics)
        except Exception as error:  # whatever it is, the model that is there answers on
            reason = traceback_location(error)
        else:
            drain = asyncio.get_running_loop().create_task(self._served.drain(self._served.replace(service)))
            self._drains.add(drain)
            drain.add_done_callback(self._drains.discard)
        outcome = "refused" if reason else "loaded"
        self._served.metrics.reloads.labels(name, outcome).inc()
        self._log.log_request(event="reload", model=name, outcome=outcome, reason=reason)

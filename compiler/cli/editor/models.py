"""The structure of recipes' models, looked up beside the editor: the weights of a folder are hashed on the way."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from ....dsl.checker.recipe import Invocation
from ....dsl.checker.skeleton import Skeleton
from ....dsl.syntax.source import Span
from ...driver.api import Session, skeleton_cache_key

PATIENCE = 0.05  # seconds in which most are found; what takes longer is told when it is there


class Models:
    """One thread for each look, none of which keeps the process; `notify` is called from it once one has ended that
    nobody waited for."""

    def __init__(self) -> None:
        self.looks: dict[str, Future[Skeleton | None]] = {}
        self.notify: Callable[[], None] = lambda: None

    def look_up_in_background(self, key: str, find_skeleton: Callable[[], Skeleton | None]) -> Future[Skeleton | None]:
        if key not in self.looks:
            future: Future[Skeleton | None] = Future()
            self.looks[key] = future
            threading.Thread(target=_run, args=(future, find_skeleton), daemon=True).start()
            if not wait([future], PATIENCE).done:
                future.add_done_callback(lambda _: self.notify())
        return self.looks[key]

    def forget(self) -> None:
        """Files have changed: what was found is looked up again."""
        self.looks = {key: future for key, future in self.looks.items() if not future.done()}


def _run(future: Future[Skeleton | None], find: Callable[[], Skeleton | None]) -> None:
    try:
        future.set_result(find())
    except BaseException as error:  # a Reject is said of the recipe; the rest is ours, and raised where it is asked
        future.set_exception(error)


@dataclass
class EditorSession(Session):
    """A recipe as an editor checks it: the skeletons of its models, and the places of those that a thread still looks
    at."""

    models: Models = field(default_factory=Models)
    skeletons: list[Skeleton] = field(default_factory=list)
    awaited: list[Span | None] = field(default_factory=list)

    def stored_skeleton(self, call: Invocation) -> Skeleton | None:
        future = self.models.look_up_in_background(
            skeleton_cache_key(call), lambda: super(EditorSession, self).stored_skeleton(call)
        )
        if not future.done():
            self.awaited.append(call.span)
            return None
        known = future.result()
        if known is not None:
            self.skeletons.append(known)
        return known

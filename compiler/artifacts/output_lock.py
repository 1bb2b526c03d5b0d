"""A place where an artifact is to go, held while it is computed: a second compile is refused before it computes.

The hold is a lock of the system on a hidden file beside the place, so that it ends with its process, however that ends.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...dsl.checker.recipe import Invocation, Recipe
from ...dsl.syntax.diagnostics import Fault, Reject
from ..core.error_location import placed
from . import unfinished_marker
from .artifact import check_free, drop_empty, environment

output_busy = Fault(
    "output-busy",
    "Another process compiles into the place where an artifact should go.\n\n"
    "Only one of two can leave its artifact there, so the second is refused before it computes anything.",
    exit="usage",
)


@dataclass(frozen=True)
class Place:
    """Where a target that a recipe calls is to write: below a folder, and a file alone where it is `about` others."""

    folder: Path
    call: Invocation
    about: bool = False

    @property
    def path(self) -> Path:
        return Path(os.path.abspath(self.folder / self.call.args["path"]))


def places_of(recipes: Sequence[Recipe], out: Path, is_about: Callable[[str], bool]) -> list[Place]:
    """Where artifacts of checked recipes are to go: the recipe's text alone says."""
    return [
        Place(out / recipe.variant, emit.call, is_about(emit.call.word))
        for recipe in recipes
        for pipeline in recipe.pipelines.values()
        for emit in pipeline.emits
    ]


@contextmanager
def claimed(places: Sequence[Place], force: bool) -> Iterator[None]:
    """Hold places inside the `with`.

    Raises Reject where one is taken (output-exists), can't be written (output-unwritable), or another process holds it
    (output-busy).
    """
    with ExitStack() as held:
        check_places(places, force)
        for place in places:
            with placed(place.call.where("path")):
                held.enter_context(_held(place.path))
        check_places(places, force)  # who held one before may have left an artifact there
        yield
        for place in places:
            unfinished_marker.forget(place.path)


def check_places(places: Sequence[Place], force: bool) -> None:
    """Raises Reject where one is taken (output-exists) or can't be written (output-unwritable)."""
    for place in places:
        with placed(place.call.where("path")):
            mine = force or unfinished_marker.is_unfinished(place.path, place.call)
            check_free(place.folder / place.call.args["path"], mine, place.about)


@contextmanager
def _held(place: Path) -> Iterator[None]:
    file = place.with_name(f".{place.name}.effc-lock")
    made = [folder for folder in place.parents if not folder.exists()]  # the innermost first
    with environment(place):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(file)
    if handle is None:
        drop_empty(made)
        raise Reject(
            output_busy(
                f"another process compiles into {place} now{_whose(file)}",
                help="wait for it, or name another folder with -o",
            )
        )
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held: who opens it now looks whether it is still there
        os.close(handle)
        drop_empty(made)


def _locked(file: Path) -> int | None:
    """An open file that this process alone has locked; None where another has."""
    try:
        import fcntl
    except ImportError:  # a system without such locks: the end of a compile still refuses a place that is taken
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        if _is_there(file, handle):
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
            return handle
        os.close(handle)  # who held it before took the name away


def _is_there(file: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.lstat(file), os.fstat(handle))
    except FileNotFoundError:
        return False


def _whose(file: Path) -> str:
    try:
        said = file.read_bytes()[:20].strip()
    except OSError:
        return ""
    return f": process {int(said)}" if said.isdigit() else ""

"""A place where an artifact is to go, held while it is computed: a second compile is refused before it computes.

The hold is a lock of the system on a hidden file beside the place, so that it ends with its process, however that ends.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...dsl.checker.recipe import Invocation, Recipe
from ...dsl.syntax.diagnostics import Fault
from ..core.error_location import diagnostics_located_at
from . import unfinished_marker
from .artifact import filesystem_errors_as_diagnostics, refuse_output_path, remove_nested_folders_while_empty

output_busy = Fault(
    "output-busy",
    "Another process compiles into the place where an artifact should go.\n\n"
    "Only one of two can leave its artifact there, so the second is refused before it computes anything.",
    exit="usage",
)


@dataclass(frozen=True)
class OutputPath:
    """Output path of a target: a folder, or a single file where the target describes artifacts."""

    folder: Path
    call: Invocation
    describes_artifacts: bool = False

    @property
    def path(self) -> Path:
        return Path(os.path.abspath(self.folder / self.call.args["path"]))


def output_paths(recipes: Sequence[Recipe], out: Path, is_report_target: Callable[[str], bool]) -> list[OutputPath]:
    """Output paths of checked recipes, by the recipe's text alone."""
    return [
        OutputPath(out / recipe.variant, emit.call, is_report_target(emit.call.word))
        for recipe in recipes
        for pipeline in recipe.pipelines.values()
        for emit in pipeline.emits
    ]


@contextmanager
def outputs_locked_until_finished(outputs: Sequence[OutputPath], overwrite: bool) -> Iterator[None]:
    """Hold places inside the `with`.

    Raises Reject where one is taken (output-exists), can't be written (output-unwritable), or another process holds it
    (output-busy).
    """
    with ExitStack() as stack:
        check_outputs(outputs, overwrite)
        for output in outputs:
            with diagnostics_located_at(output.call.argument_or_call_span("path")):
                stack.enter_context(_lock_output(output.path))
        check_outputs(outputs, overwrite)  # who held one before may have left an artifact there
        yield
        for output in outputs:
            unfinished_marker.remove_marker(output.path)


def check_outputs(outputs: Sequence[OutputPath], overwrite: bool) -> None:
    """Raises Reject where one is taken (output-exists) or can't be written (output-unwritable)."""
    for output in outputs:
        with diagnostics_located_at(output.call.argument_or_call_span("path")):
            mine = overwrite or unfinished_marker.is_untouched_partial_output(output.path, output.call)
            refuse_output_path(output.folder / output.call.args["path"], mine, output.describes_artifacts)


@contextmanager
def _lock_output(path: Path) -> Iterator[None]:
    file = path.with_name(f".{path.name}.effc-lock")
    created = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    with filesystem_errors_as_diagnostics(path):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = _try_lock(file)
    if handle is None:
        remove_nested_folders_while_empty(created)
        raise output_busy(
            f"another process compiles into {path} now{_holder_text(file)}",
            help="wait for it, or name another folder with -o",
        ).rejection()
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held: who opens it now looks whether it is still there
        os.close(handle)
        remove_nested_folders_while_empty(created)


def _try_lock(file: Path) -> int | None:
    """An open file that this process alone has locked; None where another has."""
    try:
        import fcntl
    except ImportError:  # a system without such locks: the end of a compile still refuses a place that is taken
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        _require_single_hard_link(file, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        if _is_still_open_file(file, handle):
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
            return handle
        os.close(handle)  # who held it before took the name away


def _require_single_hard_link(file: Path, fd: int) -> None:
    """Raises OSError (EEXIST) where the file is another user's file by a second name, or no regular file."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(fd)
        raise OSError(errno.EEXIST, "is no lock file of effc: remove it", str(file))


def _is_still_open_file(file: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.lstat(file), os.fstat(fd))
    except FileNotFoundError:
        return False


def _holder_text(file: Path) -> str:
    try:
        pid = file.read_bytes()[:20].strip()
    except OSError:
        return ""
    return f": process {int(pid)}" if pid.isdigit() else ""

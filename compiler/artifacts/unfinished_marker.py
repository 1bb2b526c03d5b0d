"""Marker of an unfinished compile in its output folders: the same recipe may write there again.

A hidden file beside each artifact names the recipe and what was put there. It is taken away once the whole compile has
ended, so that after a kill between two artifacts "compile again" is all that there is to do.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from ...dsl.checker.recipe import Invocation
from ...dsl.syntax.diagnostics import Reject
from ..core.cache import write_atomic
from ..core.safe_read import CONFIG, MALFORMED, MIB, read_json, read_regular_file
from .manifest import NAME


def write_unfinished_marker(path: Path, call: Invocation) -> None:
    """Note what lies in a place now, and whose. It is a convenience: where it can't be written, there is none."""
    with suppress(OSError, Reject):  # a manifest beyond all bounds, too
        write_atomic(
            _marker_path(path),
            json.dumps({"recipe": _recipe_path_text(call), "sha256": _manifest_or_file_sha256(path)}).encode(),
        )


def is_untouched_partial_output(path: Path, emit: Invocation) -> bool:
    """Whether a place holds what an unfinished compile of the same recipe put there, and nothing since."""
    try:
        note = read_json(_marker_path(path), CONFIG)
        return note == {"recipe": _recipe_path_text(emit), "sha256": _manifest_or_file_sha256(path)}
    except (OSError, Reject, *MALFORMED):
        return False


def remove_marker(path: Path) -> None:
    with suppress(OSError):
        _marker_path(path).unlink(missing_ok=True)


def _marker_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.effc-unfinished")


def _recipe_path_text(call: Invocation) -> str:
    """The file that calls a target; "" where none did."""
    return str(Path(call.span.source.name).resolve()) if call.span else ""


def _manifest_or_file_sha256(path: Path) -> str:
    file = path / NAME if path.is_dir() else path
    return hashlib.sha256(read_regular_file(file, 64 * MIB)).hexdigest()

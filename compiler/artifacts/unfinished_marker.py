"""What a compile that did not come to its end has left in its places: the same recipe may write there again.

A hidden file beside each artifact names the recipe and what was put there. It is taken away once the whole compile has
ended, so that after a kill between two artifacts "compile again" is all that there is to do.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from ...dsl.checker.recipe import Invocation
from ...dsl.syntax.diagnostics import Reject
from ..core.cache import write_whole
from ..core.safe_read import CONFIG, MIB, MISFIT, read_json, read_regular
from .manifest import NAME


def mark(place: Path, call: Invocation) -> None:
    """Note what lies in a place now, and whose. It is a convenience: where it can't be written, there is none."""
    with suppress(OSError, Reject):  # a manifest beyond all bounds, too
        write_whole(_note(place), json.dumps({"recipe": _recipe(call), "sha256": _hash(place)}).encode())


def is_unfinished(place: Path, call: Invocation) -> bool:
    """Whether a place holds what an unfinished compile of the same recipe put there, and nothing since."""
    try:
        note = read_json(_note(place), CONFIG)
        return note == {"recipe": _recipe(call), "sha256": _hash(place)}
    except (OSError, Reject, *MISFIT):
        return False


def forget(place: Path) -> None:
    with suppress(OSError):
        _note(place).unlink(missing_ok=True)


def _note(place: Path) -> Path:
    return place.with_name(f".{place.name}.effc-unfinished")


def _recipe(call: Invocation) -> str:
    """The file that calls a target; "" where none did."""
    return str(Path(call.span.source.name).resolve()) if call.span else ""


def _hash(place: Path) -> str:
    file = place / NAME if place.is_dir() else place
    return hashlib.sha256(read_regular(file, 64 * MIB)).hexdigest()

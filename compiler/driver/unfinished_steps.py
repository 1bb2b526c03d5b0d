"""Scratch of an unfinished step: whether the next run may resume from it.

Scores and pieces of a step are computed from weights that are mapped. A run that is killed can't look whether the files
still were what they had been, so it says at its start what they are, and the next one looks.
"""

import json
import os
import shutil
from pathlib import Path

from ..core.cache import Cache, write_atomic
from ..core.events import Said
from ..core.safe_read import CONFIG, MALFORMED, read_json
from ..plugin.context import Context

RECORD = "origin.json"  # path -> size, mtime in ns, inode


def prepare_step_scratch(cache: Cache, step_key: str, ctx: Context) -> None:
    """Make the scratch of a step that is about to run, emptied where files that it was computed from were written."""
    scratch = cache.make_checked_scratch(step_key)
    files = ctx.origin.files
    if files is None:
        return
    known = _read_file_states(scratch)
    if known is None or (changed := next((path for path in known if _was_modified(path, known[path])), None)):
        reason = "its record is torn" if known is None else f"{changed} was written meanwhile"
        ctx.emit_event(Said(f"what an earlier run left of this step is not used: {reason}"))
        remove_scratch(cache, step_key)
        scratch, known = cache.make_checked_scratch(step_key), {}
    for path, (size, mtime, _, inode) in files.facts.items():
        known[str(path.resolve())] = [size, mtime, inode]
    write_atomic(scratch / RECORD, json.dumps(known).encode())


def remove_scratch(cache: Cache, step_key: str) -> None:
    """Forget what a step left."""
    shutil.rmtree(cache.scratch_folder(step_key), ignore_errors=True)


def _read_file_states(scratch: Path) -> dict[str, list[int]] | None:
    """State of files when the step started; empty where it never did, None where that can't be read."""
    try:
        known = read_json(scratch / RECORD, CONFIG)
        return {path: [int(number) for number in facts] for path, facts in known.items()}
    except FileNotFoundError:
        return {}
    except MALFORMED:
        return None


def _was_modified(path: str, recorded_state: list[int]) -> bool:
    """Whether a file was written in place. One that is gone or another one now, as after a move to another disk,
    was not: what had been mapped stayed as it was."""
    try:
        current = os.stat(path)
    except OSError:
        return False
    return [current.st_size, current.st_mtime_ns] != recorded_state[:2] and current.st_ino == recorded_state[2]

"""What a step that did not finish left in its scratch: whether the next run of it may go on from there.

Scores and pieces of a step are computed from weights that are mapped. A run that is killed can't look whether the files
still were what they had been, so it says at its start what they are, and the next one looks.
"""

import json
import os
import shutil
from pathlib import Path

from ..core.cache import Cache, write_whole
from ..core.events import Said
from ..core.safe_read import CONFIG, MISFIT, read_json
from ..plugin.context import Context

RECORD = "origin.json"  # path -> size, mtime in ns, inode


def claim(cache: Cache, key: str, ctx: Context) -> None:
    """Make the scratch of a step that is about to run, emptied where files that it was computed from were written."""
    scratch = cache.scratch(key)
    files = ctx.origin.files
    if files is None:
        return
    known = _record(scratch)
    if known is None or (written := next((path for path in known if _is_written(path, known[path])), None)):
        said = "its record is torn" if known is None else f"{written} was written meanwhile"
        ctx.tell(Said(f"what an earlier run left of this step is not used: {said}"))
        drop(cache, key)
        scratch, known = cache.scratch(key), {}
    for path, (size, mtime, _, inode) in files.facts.items():
        known[str(path.resolve())] = [size, mtime, inode]
    write_whole(scratch / RECORD, json.dumps(known).encode())


def drop(cache: Cache, key: str) -> None:
    """Forget what a step left."""
    shutil.rmtree(cache.work(key), ignore_errors=True)


def _record(scratch: Path) -> dict[str, list[int]] | None:
    """What files were when the step began; empty where it never did, None where that can't be read."""
    try:
        known = read_json(scratch / RECORD, CONFIG)
        return {path: [int(number) for number in facts] for path, facts in known.items()}
    except FileNotFoundError:
        return {}
    except MISFIT:
        return None


def _is_written(path: str, facts: list[int]) -> bool:
    """Whether a file was written in place. One that is gone or another one now, as after a move to another disk,
    was not: what had been mapped stayed as it was."""
    try:
        now = os.stat(path)
    except OSError:
        return False
    return [now.st_size, now.st_mtime_ns] != facts[:2] and now.st_ino == facts[2]

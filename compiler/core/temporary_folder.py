"""Folders of temporary files that carry the id of their process, by which a cache knows whether it still runs."""

import os
import re
import tempfile
from pathlib import Path

_NAME = re.compile(r"effc-(\d+)-.*")


def make_temporary_folder(parent: Path | None) -> Path:
    """New folder that this user alone can open, in `parent` or where the system has such folders."""
    return Path(tempfile.mkdtemp(prefix=f"effc-{os.getpid()}-", dir=parent))


def is_in_use(folder: Path) -> bool:
    """Whether a folder is of a process that still runs, on this machine."""
    match = _NAME.fullmatch(folder.name)
    if not match:
        return False
    try:
        os.kill(int(match[1]), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True

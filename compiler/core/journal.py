"""Journal of a long pass: an append-only file that survives being killed at any byte."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Journal:
    """Answers by key, each on a line of its own with a checksum; a torn last line is dropped.

    A pass asks `get_or_compute(key, compute)` for every expensive value. A second run of the same step reads what
    the first one had finished and goes on from there; values are JSON, and floats survive it bit for bit.
    """

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, Any] = {}
        self.replayed = 0
        if path.exists():
            self._load_and_truncate_at_torn_line()

    def _load_and_truncate_at_torn_line(self) -> None:
        """Load lines up to the first that is torn or changed, and cut the file there."""
        sound_bytes = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            record = _parse_checked_line(line)
            if record is None:
                break
            self.known[record[0]] = record[1]
            sound_bytes += len(line)
        os.truncate(self.path, sound_bytes)  # what follows a torn line was never answered

    def get_or_compute(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value of `key`, computed once; on disk before it is returned."""
        if key in self.known:
            self.replayed += 1
            return self.known[key]
        value = compute()
        body = json.dumps([key, value], separators=(",", ":"))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.write(f"{_digest(body)} {body}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        self.known[key] = json.loads(body)[1]
        return self.known[key]


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _parse_checked_line(line: bytes) -> tuple[str, Any] | None:
    try:
        digest, body = line.decode().rstrip("\n").split(" ", 1)
    except (UnicodeDecodeError, ValueError):
        return None
    if not line.endswith(b"\n") or digest != _digest(body):
        return None
    try:
        key, value = json.loads(body)
    except (ValueError, TypeError, RecursionError):
        return None
    return (key, value) if isinstance(key, str) else None

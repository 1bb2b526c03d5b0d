"""sha256 of files and folders; a file that has not changed is not read twice."""

import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from ...dsl.syntax.diagnostics import Reject
from .cache import canonical_json_sha256, write_atomic
from .events import iterate_and_report
from .sealed_json import cache_damaged, read_sealed_hash, sealed_hash_bytes

PIECE = 16 << 20  # bytes
# A file written this recently (seconds) may be written again within one tick of its clock: not remembered.
SETTLED = 2.0


def cached_file_hash(path: Path, cache_dir: Path) -> str:
    """sha256 of a file's content as hex, remembered in `cache_dir` by path, size, mtime and inode."""
    path = path.resolve()
    fact = path.stat()
    name = canonical_json_sha256([str(path), fact.st_size, fact.st_mtime_ns, fact.st_ino])
    entry = cache_dir / "hashes" / name[:2] / name
    try:
        if known := read_sealed_hash(entry, cache_dir):
            return known
    except Reject as rejection:  # one that is damaged is made again; `effc cache verify` names it
        if rejection.diagnostics[0].fault is not cache_damaged:
            raise
    content_hash = sha256_of_file(path)
    if time.time() - fact.st_mtime > SETTLED and _is_unchanged(fact, path.stat()):
        with suppress(OSError):  # a cache that can only be read: hashed again next time
            write_atomic(entry, sealed_hash_bytes(name, content_hash))
    return content_hash


def _is_unchanged(before: os.stat_result, after: os.stat_result) -> bool:
    """Whether nobody wrote a file while it was read: what was read would be of neither the old nor the new one."""
    return all(getattr(before, f) == getattr(after, f) for f in ("st_size", "st_mtime_ns", "st_ctime_ns", "st_ino"))


def sha256_of_file(path: Path) -> str:
    """sha256 of a file that is read a piece at a time, so that many gigabytes tell how far they are."""
    digest_, parts = hashlib.sha256(), -(-path.stat().st_size // PIECE)
    with open(path, "rb", buffering=0) as file:
        for _ in iterate_and_report(range(parts), f"hashing {path.name}, pieces of 16 MiB", parts):
            digest_.update(file.read(PIECE))
        while piece := file.read(PIECE):  # it grew since its size was taken
            digest_.update(piece)
    return digest_.hexdigest()


def names_and_contents_hash(files: Iterable[Path] | Mapping[str, Path], cache_dir: Path) -> str:
    """One hash over several files: their names and contents, not where they lie."""
    named = files if isinstance(files, Mapping) else {f.name: f for f in files}
    return canonical_json_sha256({name: cached_file_hash(path, cache_dir) for name, path in named.items()})

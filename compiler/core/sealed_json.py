"""JSON files of the cache that say of themselves whether they are whole: a seal over all the rest."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...dsl.syntax.diagnostics import Fault
from .safe_read import MANIFEST, read_json, read_regular_file

SEAL = "seal"
HASH = re.compile(r"[0-9a-f]{64}")

cache_damaged = Fault("cache-damaged", "A file of the cache does not hold what its name says.", exit="environment")
cache_open = Fault(
    "cache-open",
    "Others than its owner can write to the cache.\n\n"
    "What is kept there is taken for what effc computed itself: whoever writes to it decides what a compile gives.",
    exit="environment",
)
cache_closed = Fault(
    "cache-closed",
    "A step has to be computed, and nothing can be kept in the cache.\n\n"
    "What is kept there can be used all the same: a compile of which every step is there needs no more than reading.",
    exit="environment",
)
_HELP = "run `effc cache verify --delete`, then compile again"


def canonical_json(value: Any) -> str:
    """JSON with one spelling per value: what hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sealed_json_bytes(body: Mapping[str, Any]) -> bytes:
    """A record as the cache keeps it: with the hash of everything in it."""
    plain = json.loads(canonical_json(body))  # as it is read again: keys are text
    return canonical_json({**plain, SEAL: _seal_of_record(plain)}).encode()


def _seal_of_record(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json({k: v for k, v in body.items() if k != SEAL}).encode()).hexdigest()


def read_sealed_record(path: Path, cache_folder: Path) -> dict[str, Any] | None:
    """A record of the cache in `cache_folder`; None where there is none.

    Raises Reject (cache-damaged) where it is no object or was changed since it was written. What effc wrote before
    there were seals has none.
    """
    try:
        body = read_json(path, MANIFEST, cache_folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise cache_damaged(f"{path} can't be read: {error.strerror}", help=_HELP).rejection() from error
    except (ValueError, RecursionError) as error:
        raise cache_damaged(f"{path} is not JSON", help=_HELP).rejection() from error
    if not isinstance(body, dict):
        raise cache_damaged(f"{path} is no JSON object", help=_HELP).rejection()
    try:
        is_intact = SEAL not in body or body[SEAL] == _seal_of_record(body)
    except (ValueError, RecursionError):
        is_intact = False
    if not is_intact:
        raise cache_damaged(f"{path} was changed after it was written", help=_HELP).rejection()
    return body


def read_self_named_record(path: Path, folder: Path) -> dict[str, Any] | None:
    """A sealed record that says itself, by `key`, which file it is; None where there is none, or none with a seal.

    Raises Reject (cache-damaged) where it was changed, or is another file's.
    """
    body = read_sealed_record(path, folder)
    if body is None or SEAL not in body:  # of before there were seals: made again
        return None
    if body.get("key") != path.stem:
        raise cache_damaged(f"{path} belongs to another name", help=_HELP).rejection()
    return body


def sealed_hash_bytes(name: str, content_hash: str) -> bytes:
    """A file's hash as the cache keeps it under a name, with a seal over both."""
    return f"{content_hash} {_seal_of_hash(name, content_hash)}".encode()


def read_sealed_hash(path: Path, cache_folder: Path) -> str | None:
    """A file's hash that the cache keeps; None where there is none, or one of before there were seals.

    Raises Reject (cache-damaged) where it was changed, or is another name's.
    """
    try:
        content, space, seal = read_regular_file(path, 1 << 10, cache_folder).decode().partition(" ")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise cache_damaged(f"{path} can't be read as a hash", help=_HELP).rejection() from error
    if HASH.fullmatch(content) and not space:
        return None
    if seal != _seal_of_hash(path.name, content):
        raise cache_damaged(f"{path} was changed after it was written", help=_HELP).rejection()
    return content


def _seal_of_hash(name: str, content_hash: str) -> str:
    return hashlib.sha256(canonical_json([name, content_hash]).encode()).hexdigest()


def _direct_subfolders(folder: Path) -> list[Path]:
    """The folders of a cache; what lies deeper is named by a hash, or checked as it is read."""
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir()]
    except OSError:
        return []


def refuse_writable_by_others(folder: Path) -> None:
    """Reject (cache-open) a folder that other people than this one can write to."""
    if not hasattr(os, "getuid"):
        return
    for path in (folder, *_direct_subfolders(folder)):
        try:
            fact = path.stat()
        except OSError:
            continue
        is_user_group = (
            fact.st_gid == os.getgid() and fact.st_gid == fact.st_uid
        )  # a group of one, as Debian makes them
        if fact.st_uid not in (os.getuid(), 0):
            raise cache_open(
                f"{path} belongs to another user", help="give a folder of your own by --cache-dir"
            ).rejection()
        if fact.st_mode & stat.S_IWOTH or (fact.st_mode & stat.S_IWGRP and not is_user_group):
            raise cache_open(
                f"{path} can be written to by others",
                help=f"`chmod -R go-w {folder}`, then `effc cache verify`; or give another folder by --cache-dir",
            ).rejection()

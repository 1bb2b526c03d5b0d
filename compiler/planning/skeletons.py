"""The shelf of skeletons: one JSON file per config, so that `check` and `plan` don't need torch again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...dsl.diagnostics import Reject
from ...dsl.skeleton import FORMAT, Skeleton
from ..store.cache import digest, remember
from ..store.closure import fingerprint as source_hash
from ..store.sealed import read_noted, sealed


def fingerprint(config: Mapping[str, Any], transformers_version: str) -> str:
    """The key of a config's skeleton.

    Two things besides the config decide it: the library that builds the model, and the source of capture, discovery
    and the rehearsal of its branches.
    """
    folder = Path(__file__).parents[1]
    sources = [
        source_hash(folder / name) for name in ("capture/capture.py", "discovery/discover.py", "editing/rehearsed.py")
    ]
    return digest([FORMAT, dict(config), transformers_version, sources])


def store(folder: Path, key: str, skeleton: Skeleton) -> None:
    """Keep a skeleton; a reader sees all of it or nothing, a folder that can only be read stays as it is."""
    remember(folder / f"{key}.json", sealed({"key": key, "skeleton": skeleton.to_json()}))


def load(folder: Path, key: str) -> Skeleton | None:
    """The skeleton kept under a key; None where there is none, or its file is damaged or of another form."""
    try:
        body = read_noted(folder / f"{key}.json", folder)
        return None if body is None else Skeleton.from_json(body["skeleton"])
    except (ValueError, KeyError, TypeError, Reject):
        return None

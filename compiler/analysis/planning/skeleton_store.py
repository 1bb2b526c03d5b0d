"""The shelf of skeletons: one JSON file per config, so that `check` and `plan` don't need torch again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....dsl.checker.skeleton import FORMAT, Skeleton
from ....dsl.syntax.diagnostics import Reject
from ...core.cache import canonical_json_sha256, write_atomic_if_permitted
from ...core.sealed_json import read_self_named_record, sealed_json_bytes
from ...core.source_closure import import_closure_sha256 as source_hash


def skeleton_key(config: Mapping[str, Any], transformers_version: str) -> str:
    """The key of a config's skeleton.

    Two things besides the config decide it: the library that builds the model, and the source of capture, discovery
    and the rehearsal of its branches.
    """
    folder = Path(__file__).parents[2]
    sources = [
        source_hash(folder / name)
        for name in ("ir/capture/capture.py", "analysis/discovery/streams.py", "transforms/editing/rehearsed.py")
    ]
    return canonical_json_sha256([FORMAT, dict(config), transformers_version, sources])


def store_skeleton(folder: Path, key: str, skeleton: Skeleton) -> None:
    """Keep a skeleton; a reader sees all of it or nothing, a folder that can only be read stays as it is."""
    write_atomic_if_permitted(folder / f"{key}.json", sealed_json_bytes({"key": key, "skeleton": skeleton.to_json()}))


def load_skeleton(folder: Path, key: str) -> Skeleton | None:
    """The skeleton kept under a key; None where there is none, or its file is damaged or of another form."""
    try:
        body = read_self_named_record(folder / f"{key}.json", folder)
        return None if body is None else Skeleton.from_json(body["skeleton"])
    except (ValueError, KeyError, TypeError, Reject):
        return None

"""Artifacts of what a test's function writes into a folder."""

from collections.abc import Callable
from pathlib import Path

from effc.compiler.artifacts.artifact import artifact_draft
from effc.compiler.artifacts.manifest import Manifest


def write_artifact(into: Path, *, build: Callable[[Path], Manifest], force: bool = False) -> Manifest:
    with artifact_draft(into, force) as draft:
        return draft.publish(build(draft.folder))

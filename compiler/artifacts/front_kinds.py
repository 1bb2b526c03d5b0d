"""Artifacts that hold points to choose from, whatever target wrote them."""

from pathlib import Path

from ...dsl.syntax.diagnostics import Fault
from .manifest import Manifest, read_manifest

no_front = Fault("no-front", "A point is picked from an artifact that holds one model.", exit="usage")


def read_front_manifest(artifact: Path) -> Manifest:
    """The manifest of a front; Reject (no-front) of anything else."""
    front = read_manifest(artifact)
    if not front.members:
        raise no_front(
            f"{artifact} was written by the target `{front.kind}`, which holds one model",
            help='emit a front first: `emit NAME { front("sizes") }`',
        ).rejection()
    return front

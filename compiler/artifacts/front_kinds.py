"""Artifacts that hold points to choose from, whatever target wrote them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def members_with_interleaved_times(front: Manifest) -> tuple[Mapping[str, Any], ...]:
    """Its points, with the times that the report took of them in turns with the original, where there are such.

    Those that a search added up from a table are of one table, and stay.
    """
    if latency_table_error(front) is not None:
        return tuple(front.members)
    timings = front.run.get("timings")
    names = timings if isinstance(timings, Mapping) else {}
    timed = {row.metric: row.compiled for row in front.measures if row.metric in names and row.compiled is not None}

    def measures(member: Mapping[str, Any]) -> list[list[Any]]:
        return [
            [metric, timed.get(f"{metric} of {member['name']}", value), *unit]
            for metric, value, *unit in member["measures"]
        ]

    return tuple({**member, "measures": measures(member)} for member in front.members)


def latency_table_error(front: Manifest) -> float | None:
    """Of the table that a search added times up from, as a share; None where nothing was timed."""
    notes = [note for step in front.steps for note in step.get("decisions", ()) if isinstance(note, dict)]
    errors = [error for note in notes if isinstance(error := note.get("latency_error"), float)]
    return errors[-1] if errors else None

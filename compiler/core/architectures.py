"""Test results by architecture, read from architectures.json.

`python -m tests.architectures.matrix --write` makes the file: every stage of every pass either worked, or was refused
with a sentence.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("architectures.json")
_SHORT = {"green": "ok", "none": "-", "refused": "refused"}


@dataclass(frozen=True)
class Matrix:
    """`cells`: architecture -> column -> "ok", "-" or "refused"; `refusals`: sentence -> where it was said; `looks`:
    the columns that a capture has."""

    columns: tuple[str, ...]
    looks: tuple[str, ...]
    cells: dict[str, dict[str, str]]
    refusals: dict[str, list[str]]
    counts: dict[str, int]
    versions: dict[str, str]

    @property
    def summary(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.counts['green']} of {self.counts['total']} stages work, {self.counts['refused']} are refused "
            f"({versions})"
        )


def parse_architecture_matrix(body: dict[str, Any] | None = None) -> Matrix:
    """Parse the architecture matrix: the shipped one, or that of a run."""
    body = body or json.loads(FILE.read_text(encoding="utf-8"))
    columns = (*body["looks"], *body["passes"])
    cells = {}
    refusals: dict[str, list[str]] = {}
    for name, stages in body["rows"].items():
        cells[name] = {probe: _SHORT[stages[probe][0]] for probe in body["looks"]}
        for word in body["passes"]:
            states = [stages[f"{word} {step}"][0] for step in body["steps"]]
            cells[name][word] = _SHORT["refused" if "refused" in states else states[-1]]
        for stage, (state, *reason) in stages.items():
            if state == "refused":
                refusals.setdefault(reason[0], []).append(f"{name}: {stage}")
    return Matrix(columns, tuple(body["looks"]), cells, refusals, body["counts"], body["versions"])

"""Input of a page: the manifest of an artifact, where it lies, and its hash.

Whatever a manifest holds was written by somebody. `check_form` has seen to the records; what lies in its tables is
taken here with these few functions, which give nothing where it is of another form.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....dsl.syntax.diagnostics import Reject
from ...core.safe_read import DATA, MALFORMED, read_json
from ..manifest import Manifest, artifact_hash, read_manifest


@dataclass(frozen=True)
class ReportData:
    """`location` as the page names it; `hash` is "" for no artifact; `calibration` is that of test-time compute."""

    location: str
    manifest: Manifest
    hash: str = ""
    calibration: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(artifact: Path) -> "ReportData":
        return ReportData(
            artifact.name,
            read_manifest(artifact),
            artifact_hash(artifact),
            _read_calibration_or_empty(artifact / "calibration.json"),
        )

    @property
    def pipeline(self) -> tuple[str, ...]:
        """Key of the artifacts that show one result: recipe, variant and pipeline."""
        recipe = self.manifest.recipe
        return recipe.get("text", ""), recipe.get("variant", ""), self.manifest.name


def _read_calibration_or_empty(file: Path) -> Mapping[str, Any]:
    try:
        return mapping_or_empty(read_json(file, DATA))
    except (OSError, Reject, *MALFORMED):
        return {}


def finite_number_or_none(value: Any) -> float | None:
    """A finite number, or None."""
    if type(value) not in (int, float) or not -1e300 < value < 1e300:  # false for nan
        return None
    return float(value)


def mapping_or_empty(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def list_or_empty(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def one_line_or_empty(value: Any, max_length: int = 200) -> str:
    """A text on one line; "" of anything else."""
    text = " ".join(value.split()) if isinstance(value, str) else ""
    return text if len(text) <= max_length else text[: max_length - 1] + "…"

"""Differences between two artifacts. Reads manifests and headers of weights files only; no torch."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from difflib import unified_diff
from pathlib import Path
from typing import Any, TypeGuard

from ...dsl.syntax.render import without_line_breaks
from ..core.quantity import measurement_text, size_text
from ..models.checkpoints.safetensors_header import TensorSlot, read_safetensors_header
from .load import loadable_forms
from .manifest import Manifest, read_manifest


@dataclass(frozen=True)
class Row:
    """One thing that differs. `part` is "size", "shape", "measure", "step", "lock", "machine" or "recipe".

    a, b   values as stored: numbers, texts, lists of sizes; None where one has none
    """

    part: str
    what: str
    a: Any
    b: Any
    unit: str = ""


@dataclass(frozen=True)
class Difference:
    a: str
    b: str
    rows: tuple[Row, ...]
    recipe: tuple[str, ...]  # a unified diff of the texts

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        """Lines a person reads; equal artifacts are one line."""
        if not self.rows and not self.recipe:
            return f"{self.a} and {self.b} say the same of themselves\n"
        width = max((len(row.what) for row in self.rows), default=0)
        lines: list[str] = []
        part = ""
        for row in self.rows:
            if row.part != part:
                lines += ["", row.part] if lines else [row.part]
                part = row.part
            before, after = _diff_value_text(row, row.a), _diff_value_text(row, row.b)
            row_text = f"{row.what:<{width}}  {before} -> {after}{_ratio_text(row)}"
            lines.append(f"  {without_line_breaks(row_text)}")
        if self.recipe:
            lines += ["", "recipe", *(f"  {line}" for line in self.recipe)]
        return "\n".join(lines).lstrip("\n") + "\n"


def diff_artifacts(a: Path, b: Path) -> Difference:
    """Everything that differs between two artifacts; Reject where one is none."""
    one, two = read_manifest(a), read_manifest(b)
    rows = [
        *_size_rows(a, b, one, two),
        *_shape_rows(a, b, one, two),
        *_measure_rows(one, two),
        *_step_rows(one, two),
        *_differing_rows("lock", _flatten_to_dotted_keys(one.lock), _flatten_to_dotted_keys(two.lock)),
        *_differing_rows("machine", one.machine, two.machine),
    ]
    before, after = (str(m.recipe.get("text", "")).splitlines() for m in (one, two))
    changed = unified_diff(before, after, fromfile=str(a), tofile=str(b), n=1, lineterm="")
    return Difference(str(a), str(b), tuple(rows), tuple(changed))


def _size_rows(a: Path, b: Path, left: Manifest, right: Manifest) -> Iterator[Row]:
    yield from _differing_rows(
        "size",
        {"kind": left.kind, "forms": _present_form_names(left), "bytes on disk": left.bytes},
        {"kind": right.kind, "forms": _present_form_names(right), "bytes on disk": right.bytes},
    )
    yield from _differing_rows(
        "size", {"params": _measured_or_stored_params(a, left)}, {"params": _measured_or_stored_params(b, right)}
    )


def _measured_or_stored_params(artifact: Path, manifest: Manifest) -> Any:
    """Number of parameters of an artifact: as measured, else as stored where every tensor holds plain numbers."""
    for measure in manifest.measures:
        if measure.metric == "params":
            measured_params = measure.compiled
            return int(measured_params) if measured_params is not None and _is_number(measured_params) else "not known"
    slots = stored_tensor_slots(artifact, manifest).values()
    plain = bool(slots) and all("F" in slot.dtype for slot in slots)
    return sum(_num_elements(slot.shape) for slot in slots) if plain else "not known"


def _present_form_names(manifest: Manifest) -> str:
    return ", ".join(
        f for f in loadable_forms(manifest.kind) if any(name.startswith(f"{f}/") for name in manifest.files)
    )


def tensor_shapes_of(artifact: Path, manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Shapes of all stored tensors: of the truest form where there are several."""
    return {name: slot.shape for name, slot in stored_tensor_slots(artifact, manifest).items()}


def stored_tensor_slots(artifact: Path, manifest: Manifest) -> dict[str, TensorSlot]:
    """Tensors in files of safetensors, of the truest form where there are several."""
    names = [n for n in manifest.files if n.endswith(".safetensors")]
    for form in loadable_forms(manifest.kind):
        if any(n.startswith(f"{form}/") for n in names):
            names = [n for n in names if n.startswith(f"{form}/")]
            break
    headers = [read_safetensors_header(artifact / name) for name in sorted(names)]
    return {name: slot for header in headers for name, slot in header.slots.items()}


def _shape_rows(a: Path, b: Path, left: Manifest, right: Manifest) -> Iterator[Row]:
    first, second = tensor_shapes_of(a, left), tensor_shapes_of(b, right)
    if first.keys() & second.keys() or not (first or second):
        yield from _differing_rows("shape", first, second)
        return
    # Nothing of the same name: packed weights, programs and files of other formats name or hold theirs otherwise.
    pair = [
        f"{len(s)} tensors of `{m.kind}`" if s else f"held by `{m.kind}` in a way of its own"
        for s, m in ((first, left), (second, right))
    ]
    yield Row("shape", "tensors, not compared", *pair)


def _measure_rows(left: Manifest, right: Manifest) -> Iterator[Row]:
    units = {m.metric: m.unit for m in (*left.measures, *right.measures)}
    first, second = ({m.metric: m.compiled for m in manifest.measures} for manifest in (left, right))
    yield from (replace(row, unit=units[row.what]) for row in _differing_rows("measure", first, second))


def _step_rows(left: Manifest, right: Manifest) -> Iterator[Row]:
    pair = [
        {str(s.get("name", i)): str(s.get("summary") or s.get("word", "")) for i, s in enumerate(m.steps)}
        for m in (left, right)
    ]
    yield from _differing_rows("step", *pair)


def _differing_rows(section: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Row]:
    for name in dict.fromkeys((*a, *b)):
        if a.get(name) != b.get(name):
            yield Row(section, name, a.get(name), b.get(name))


def _flatten_to_dotted_keys(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= (
            _flatten_to_dotted_keys(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{name}": value}
        )
    return flat


def _num_elements(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _diff_value_text(row: Row, value: Any) -> str:
    if value is None:
        return "none"
    if row.part == "measure":
        return measurement_text(value, row.unit)
    if row.what in ("bytes on disk", "memory_bytes") and _is_number(value):
        return size_text(value)
    if isinstance(value, tuple):
        return " x ".join(map(str, value)) or "a number"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)[:60]


def _is_number(value: Any) -> TypeGuard[float]:
    """Of a size that can be drawn: what machines say of themselves may come from anybody."""
    return type(value) in (int, float) and abs(value) < 1e300  # false for nan


def _ratio_text(row: Row) -> str:
    numbers = _is_number(row.a) and _is_number(row.b)
    return f"  ({(row.b / row.a - 1) * 100:+.1f} %)" if numbers and row.a and row.part != "lock" else ""

"""A native artifact in text: what the engine does for a token, and how the weights are packed."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....dsl.syntax.render import without_line_breaks
from ....kernels import packed as packing
from ....kernels.engine_steps import STEPS
from ....kernels.native import KernelError
from ...core.json_errors import FILE_ERRORS, reject_on_error
from ...core.quantity import count_text, si_count, size_text
from .plan_files import load_weights, native_damaged, read_plan


@dataclass(frozen=True)
class WeightSummary:
    """Entries of a form and shape: how many, their bytes together, the share of weights that they store."""

    form: str
    shape: tuple[int, ...]
    entries: int
    bytes: int
    density: float


@dataclass(frozen=True)
class NativeSummary:
    """`steps`: op -> how many a token takes; `weights`: the largest first, vectors as one.

    source   op -> how many a token of a source takes, of an encoder with a decoder
    """

    facts: Mapping[str, Any]
    context: int
    steps: Mapping[str, int]
    weights: tuple[WeightSummary, ...]
    source: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "facts": dict(self.facts),
            "context": self.context,
            "steps": dict(self.steps),
            **({"source": dict(self.source)} if self.source else {}),
            "weights": [
                {
                    "form": w.form,
                    "shape": list(w.shape),
                    "entries": w.entries,
                    "bytes": w.bytes,
                    "kept": round(w.density, 4),
                }
                for w in self.weights
            ],
        }

    def to_text(self) -> str:
        head = (
            f"{without_line_breaks(self.facts['class'])}, {si_count(self.facts['params'])} parameters, "
            f"context of {count_text(self.context, 'token')}"
        )
        kinds = {"a token": self.steps, "a source": self.source}
        steps = [
            f"{of}: " + ", ".join(f"{n} {op}" for op, n in counts.items()) for of, counts in kinds.items() if counts
        ]
        rows = [
            (
                w.form,
                " x ".join(map(str, w.shape)) or "vectors",
                f"{w.entries}",
                size_text(w.bytes),
                f"{1 - w.density:.0%} zeros" if w.density < 1 else "",
            )
            for w in self.weights
        ]
        wide = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            f"  {form:<{wide[0]}}  {shape:>{wide[1]}}  {number:>{wide[2]}}  {bytes:>{wide[3]}}  {zeros}"
            for form, shape, number, bytes, zeros in rows
        ]
        total = size_text(sum(w.bytes for w in self.weights))
        return "\n".join([head, *steps, f"weights: {total}", *map(str.rstrip, lines)])


def summarise_native(folder: Path) -> NativeSummary:
    """Picture of a folder of the target `native`. Raises Reject (native-damaged)."""
    stored = read_plan(folder)
    groups: dict[tuple[str, tuple[int, ...]], list[tuple[int, float]]] = {}
    with reject_on_error(
        native_damaged,
        f"{folder}",
        "copy the artifact again, or compile again",
        error_types=(KernelError, *FILE_ERRORS),
    ):
        for name, tensor in load_weights(folder, stored, mapped=True, threads=1).items():
            form, shape = stored.entries[name]["kind"], tuple(stored.entries[name]["shape"])
            density = 1.0
            if form == "packed":
                head = packing.packed_facts(tensor)
                form, density = head.kernel, head.density
            key = (form, shape if len(shape) > 1 else ())
            groups.setdefault(key, []).append((stored.entries[name]["bytes"], density))
        steps = Counter(step["op"] for step in stored.plan["steps"])
        source = Counter(step["op"] for step in stored.plan.get("encoder", {"steps": ()})["steps"])
        if not steps.keys() | source.keys() <= STEPS.keys():
            raise ValueError("its plan has a step that the engine does not know")
        context, facts = stored.plan["context"], stored.facts
        if not (isinstance(facts["class"], str) and type(facts["params"]) is type(context) is int):
            raise TypeError("its class, parameters or context are of another form")
    weights = [
        WeightSummary(form, shape, len(members), sum(b for b, _ in members), sum(k for _, k in members) / len(members))
        for (form, shape), members in groups.items()
    ]
    weights.sort(key=lambda w: -w.bytes)
    return NativeSummary(stored.facts, context, dict(steps.most_common()), tuple(weights), dict(source.most_common()))

"""An ONNX artifact in text: what goes in and out, its ops and its weights."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....dsl.syntax.render import without_line_breaks
from ...core.quantity import si_count, size_text
from .checking import graphs_in, load_initializers, read_checked_onnx

_MAX_ITEMS = 12  # ops and shapes; the rest are counted


@dataclass(frozen=True)
class OnnxSummary:
    """`operators`: op -> how often it is called; `shapes`: shape -> (how many weights, their bytes)."""

    facts: Mapping[str, Any]
    inputs: tuple[str, ...]
    operators: Mapping[str, int]
    shapes: Mapping[str, tuple[int, int]]

    def to_json(self) -> dict[str, Any]:
        return {
            "facts": dict(self.facts),
            "inputs": list(self.inputs),
            "operators": dict(self.operators),
            "weights": [{"shape": s, "entries": n, "bytes": b} for s, (n, b) in self.shapes.items()],
        }

    def to_text(self) -> str:
        past = sum(name.startswith("past_key_values.") for name in self.inputs)
        plain = [name for name in self.inputs if not name.startswith("past_key_values.")]
        ops = [f"{n} {op}" for op, n in self.operators.items()]
        further = f" and {len(ops) - _MAX_ITEMS} more kinds" if len(ops) > _MAX_ITEMS else ""
        rows = [(shape, str(n), size_text(b)) for shape, (n, b) in list(self.shapes.items())[:_MAX_ITEMS]]
        wide = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        return "\n".join(
            [
                f"{without_line_breaks(self.facts['class'])}, {si_count(self.facts['params'])} parameters",
                f"takes {', '.join(plain)}" + (f" and {past} keys and values" if past else ""),
                f"ops: {', '.join(ops[:_MAX_ITEMS])}{further}",
                f"weights: {size_text(sum(b for _, b in self.shapes.values()))}",
                *(f"  {s:>{wide[0]}}  {n:>{wide[1]}}  {b:>{wide[2]}}" for s, n, b in rows),
            ]
        )


def summarise_onnx(folder: Path) -> OnnxSummary:
    """Picture of a folder of the target `onnx`. Raises Reject (refused-onnx)."""
    graphs = {name: read_checked_onnx(folder, name) for name in graphs_in(folder)}
    shapes: dict[str, tuple[int, int]] = {}
    operators: Counter[str] = Counter()
    for stored in graphs.values():
        operators.update(stored.operators)
    for tensor in (x for name, stored in graphs.items() for x in load_initializers(folder, stored, name).values()):
        shape = " x ".join(map(str, tensor.shape)) if tensor.dim() > 1 else "vectors"
        entries, n_bytes = shapes.get(shape, (0, 0))
        shapes[shape] = (entries + 1, n_bytes + tensor.nbytes)
    ordered = dict(sorted(shapes.items(), key=lambda item: -item[1][1]))
    inputs = tuple(dict.fromkeys(name for stored in graphs.values() for name in stored.inputs))
    return OnnxSummary(stored.facts, inputs, dict(operators.most_common()), ordered)

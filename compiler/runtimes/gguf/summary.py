"""A GGUF artifact in text: its architecture, and each layer's heads and width."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....dsl.syntax.render import without_line_breaks
from ...core.quantity import si_count, size_text
from .engine import FILE
from .facts import GgufFacts, read_facts
from .reading import read_gguf


@dataclass(frozen=True)
class GgufSummary:
    facts: GgufFacts
    params: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        f = self.facts
        layers = [
            {"heads": h, "kv_heads": k, "width": w} for h, k, w in zip(f.heads, f.kv_heads, f.widths, strict=True)
        ]
        return {"architecture": f.architecture, "params": self.params, "bytes": self.bytes, "layers": layers}

    def to_text(self) -> str:
        f = self.facts
        rows = [
            f"  layer {i}: {f'{h} heads over {k}' if h else 'no attention'}, width {w}"
            for i, (h, k, w) in enumerate(zip(f.heads, f.kv_heads, f.widths, strict=True))
        ]
        architecture = without_line_breaks(f.architecture)
        head = f"GGUF `{architecture}`, {si_count(self.params)} parameters, context of {f.context} tokens"
        return "\n".join([head, f"weights: {size_text(self.bytes)}", *rows])


def summarise_gguf(folder: Path) -> GgufSummary:
    """Picture of a folder of the target `gguf`. Raises Reject (refused-gguf)."""
    stored = read_gguf(folder / FILE)
    entries = stored.entries.values()
    numbers = 0
    for entry in entries:
        product = 1
        for axis in entry.shape:
            product *= axis
        numbers += product
    return GgufSummary(read_facts(stored), numbers, sum(entry.bytes for entry in entries))

"""ONNX files of effc in OpenVINO, beside ONNX Runtime: how weights are read, and how far logits differ.

    pip install openvino
    python -m bench.openvino_onnx

Each format of `onnx` is written of a tiny Llama with random weights. Differences are the largest of one row, of a batch whose
first row is left-padded and of tokens behind a cache, as a share of the largest logit: with products of float32, and at
OpenVINO's defaults for this processor, which may round inputs to int8 or bfloat16.
"""

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from effc.compiler.runtimes.onnx.model import open_onnx
from effc.compiler.targets.onnx import Onnx
from effc.kernels.grid import Grid

from tests import tiny
from tests.quantised import quantised
from tests.recipes_in_memory import context_of, recipe_of

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
NBITS = {"weights": "nbits"}
FORMATS: dict[str, tuple[Grid | None, dict[str, str]]] = {
    "dense": (None, {}),
    "codes of 4 bits, 0 in the middle": (Grid(4, 32, True, True), NBITS),
    "codes of 4 bits": (Grid(4, 32, False, True), NBITS),
    "codes of 8 bits, 0 in the middle": (Grid(8, 32, True, True), NBITS),
    "codes of 8 bits": (Grid(8, 32, False, True), NBITS),
    "codes of 4 bits, a scale for a row": (Grid(4, 0, False, True), NBITS),
    "int8": (None, {"dynamic": "int8"}),
    "codes of 4 bits, int8": (Grid(4, 32, True, True), {**NBITS, "dynamic": "int8"}),
}


def write_onnx(folder: Path, grid: Grid | None, options: Mapping[str, str]) -> Path:
    """The folder `onnx` of a tiny Llama whose matrices but the head are on a grid."""
    model = tiny.model("llama", intermediate_size=128)
    program = quantised(model, {"_proj": grid} if grid else {})
    Onnx(path="o", **options).emit(program, folder, context_of(folder, model, recipe_of([])))
    return folder / "onnx"


class OpenVinoDecoder:
    """`model.onnx` of a decoder, compiled by OpenVINO for the CPU."""

    def __init__(self, folder: Path, options: Mapping[str, Any]):
        import openvino

        core = openvino.Core()
        self.model = core.read_model(folder / "model.onnx")
        self.compiled = core.compile_model(self.model, "CPU", {**options, "INFERENCE_NUM_THREADS": 1})
        self.past = [i for i in self.model.inputs if i.any_name.startswith("past_key_values.")]

    def step(self, ids: torch.Tensor, mask: torch.Tensor, past: list[np.ndarray] | None = None) -> list[np.ndarray]:
        """Logits, then keys and values, which are also the `past` of the next step."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
        for n, port in enumerate(self.past):
            heads, size = (port.partial_shape[axis].get_length() for axis in (1, 3))
            inputs[port.any_name] = past[n] if past else np.zeros((len(ids), heads, 0, size), np.float32)
        results = self.compiled(inputs)
        return [results[port].copy() for port in self.compiled.outputs]

    def types_of_weights(self) -> str:
        """Element types of the matrices, with how many there are of each."""
        constants = [c for c in self.model.get_ops() if c.get_type_name() == "Constant"]
        counts = Counter(c.get_element_type().get_type_name() for c in constants if np.prod(list(c.shape)) >= 1024)
        return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))


def largest_differences(folder: Path, decoder: OpenVinoDecoder) -> dict[str, float]:
    """Largest difference to ONNX Runtime's logits as a share of the largest logit, by what was computed."""
    reference, ids = open_onnx(folder, 1), torch.arange(2, 26).view(2, 12)
    mask = torch.ones_like(ids)
    padded = mask.clone()
    padded[0, :4] = 0
    _, *past = decoder.step(ids[:, :8], mask[:, :8])
    whole = reference(input_ids=ids, attention_mask=mask).logits
    pairs = {
        "a row": (decoder.step(ids[:1], mask[:1])[0], reference(input_ids=ids[:1]).logits),
        "left-padded": (decoder.step(ids, padded)[0], reference(input_ids=ids, attention_mask=padded).logits),
        "behind a cache": (decoder.step(ids[:, 8:], mask, past)[0], whole[:, 8:]),
    }
    kept = {"left-padded": padded.bool()}
    scale, result = float(whole.abs().max()), {}
    for name, (actual, expected) in pairs.items():
        errors = (torch.from_numpy(actual) - expected).abs()
        result[name] = float(errors[kept[name]].max() if name in kept else errors.max()) / scale
    return result


def main() -> None:
    print(
        "| format | matrices in OpenVINO | a row | left-padded | behind a cache | at its defaults |\n"
        + "|---" * 6
        + "|"
    )
    for name, (grid, options) in FORMATS.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = write_onnx(Path(scratch), grid, options)
            try:
                decoder = OpenVinoDecoder(folder, EXACT)
                exact, usual = (largest_differences(folder, d) for d in (decoder, OpenVinoDecoder(folder, {})))
            except RuntimeError as error:
                print(f"| {name} | refused: {' '.join(str(error).split())} |", flush=True)
                continue
            shares = [f"{share:.1e}" for share in (*exact.values(), float(np.max(list(usual.values()))))]
            print(f"| {name} | {decoder.types_of_weights()} | {' | '.join(shares)} |", flush=True)


if __name__ == "__main__":
    main()

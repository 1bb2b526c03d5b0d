"""Print how fast SparAMX's own kernels, effc's and torch's multiply the layers of Llama 3.2 1B, by zeros and rows.

    SPARAMX=FOLDER python -m bench.sparse_amx [--threads 2] [--seconds 0.5] [--json FILE]

FOLDER is `SparAMX` of IntelLabs/Hardware-Aware-Automated-Machine-Learning, built beside its sources with the torch
that effc uses: `mkdir sparamx; python setup.py build_ext --inplace`. The processor must have AMX. Each product is
checked against torch's before it is timed. All are called in turn in one process, over cold copies of the weights, with
real-time priority (racing.py). SparAMX's number of sets, which it divides a weight into for threads, is the fastest of
`SETS`; what its layers do around a kernel, as rounding inputs and converting outputs, counts. Its int8 layers round
weights and inputs below 127 to whole numbers, so all have numbers of that size here.
"""

import argparse
import copy
import json
import os
import sys
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from effc.compiler.core.fingerprint import machine_facts
from effc.compiler.transforms.lowering.contenders import kernel_contender, prepacked_linear_contender, random_weight
from effc.compiler.transforms.lowering.racing import Contender, cold_copies, race_and_record_times

SETS = (2, 8, 32)
LAYERS = {"attention": (2048, 2048), "up": (8192, 2048), "down": (2048, 8192)}  # outputs, inputs
ROWS = (1, 32, 512)
ZEROS = (0.3, 0.5, 0.7)
ONE_ROW = ("SparAMX bf16", "SparAMX bf16 zeros, AVX")  # more end the process; take twenty times as long
SIZE = 32.0  # of weights and inputs
WEIGHTS = {"bf16": ("dense_linear", "sparse_linear"), "int8": ("dense_linear_int8", "sparse_linear_int8")}


def sparamx_layers() -> dict[str, Any]:
    """Its classes of linear layers, by what of ours they race."""
    sys.path.insert(0, os.environ["SPARAMX"])
    from layer.avx_sparse_linear import AvxSparseLinear
    from layer.dense_linear import DenseLinear
    from layer.quantized_dense_linear import QuantizedDenseLinear
    from layer.quantized_sparse_linear import QuantizedSparseLinear
    from layer.sparse_linear import SparseLinear

    return {
        "SparAMX bf16": DenseLinear,
        "SparAMX bf16 zeros": SparseLinear,
        "SparAMX bf16 zeros, AVX": AvxSparseLinear,
        "SparAMX int8": QuantizedDenseLinear,
        "SparAMX int8 zeros": QuantizedSparseLinear,
    }


def packed_layers(w: torch.Tensor, sets: int, classes: dict[str, Any]) -> dict[str, Any]:
    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=torch.bfloat16)
    linear.weight.data = w
    return {name: layer.from_linear(linear, num_threads=sets) for name, layer in classes.items()}


def sparamx_contender(name: str, packed: Any, x: torch.Tensor) -> Contender:
    bytes_of_layer, inputs = sum(p.nbytes for p in packed.parameters()), x[None].contiguous()
    layers = cold_copies(partial(copy.deepcopy, packed), bytes_of_layer)
    return Contender(name, [partial(layer, inputs) for layer in layers], bytes_of_layer)


def contenders(w: torch.Tensor, x: torch.Tensor, packed: dict[str, Any]) -> Iterator[Contender]:
    expected = torch.nn.functional.linear(x, w).float()
    ours = [kernel_contender(kernel, w, x) for kernels in WEIGHTS.values() for kernel in kernels]
    theirs = [sparamx_contender(name, layer, x) for name, layer in packed.items() if len(x) == 1 or name not in ONE_ROW]
    for contender in [prepacked_linear_contender(w, x), *ours, *theirs]:
        result = contender.calls[0]()
        assert isinstance(result, torch.Tensor)
        error = (result.float().reshape(expected.shape) - expected).norm() / expected.norm()
        assert error < 0.05, f"{contender.name}: its relative error is {float(error):.2f}"
        yield contender


def fastest_sets(classes: dict[str, Any], seconds: float) -> int:
    """Sets with the least time of SparAMX's sparse kernel on a layer, one row."""
    w, x = random_weight(*LAYERS["up"], 0.5), torch.randn(1, LAYERS["up"][1]).bfloat16()
    sparse = {"SparAMX bf16 zeros": classes["SparAMX bf16 zeros"]}
    raced = [sparamx_contender(str(sets), packed_layers(w, sets, sparse)["SparAMX bf16 zeros"], x) for sets in SETS]
    race_and_record_times(raced, seconds)
    print("microseconds by sets:", {c.name: round(c.seconds * 1e6) for c in raced}, flush=True)
    return int(min(raced, key=lambda c: c.seconds).name)


def measure(seconds: float) -> list[dict[str, Any]]:
    classes, rows = sparamx_layers(), []
    sets = fastest_sets(classes, seconds)
    for title, (n, k) in LAYERS.items():
        for zeros in ZEROS:
            w = SIZE * random_weight(n, k, zeros)
            packed = packed_layers(w, sets, classes)
            for count in ROWS:
                raced = list(contenders(w, SIZE * torch.randn(count, k).bfloat16(), packed))
                race_and_record_times(raced, seconds)
                microseconds = {c.name: round(c.seconds * 1e6, 1) for c in raced}
                times = {weights: times_as_fast(microseconds, weights) for weights in WEIGHTS}
                facts = {"layer": title, "zeros": zeros, "rows": count, "times_as_fast": times}
                rows.append(facts | {"us": microseconds, "sets": sets})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def times_as_fast(microseconds: dict[str, float], weights: str) -> float:
    """Time of SparAMX's fastest kernel of these weights over that of effc's."""
    theirs = min(value for name, value in microseconds.items() if name.startswith(f"SparAMX {weights}"))
    return round(theirs / min(microseconds[kernel] for kernel in WEIGHTS[weights]), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = machine_facts()
    if facts["isa"] != "amx":
        sys.exit("SparAMX's kernels need a processor with AMX")
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    with torch.inference_mode():
        rows = measure(options.seconds)
    if options.json:
        machine = f"{facts['cpu']} ({facts['isa']}), {options.threads} threads"
        head = {"machine": machine, "torch": facts["torch"], "date": date.today().isoformat()}
        options.json.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

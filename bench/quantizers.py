"""Print perplexity of SmolLM2 with weights of four bits by `quantize.*`: plain, and each of what is done better.

    python -m bench.quantizers FOLDER [--groups 32 64] [--seeds 0 1 2] [--samples 16] [--only NAME ...]

The model is that of smol.py, in bfloat16, which no 4-bit format gets back; all projections inside the layers are
rounded. Seeds choose the rows of 256 tokens that `quantize.gptq` and `quantize.scale` look at. Groups of 128 don't
divide the 576 inputs of most of the model's layers. FOLDER keeps what is done.
"""

import argparse
from pathlib import Path
from statistics import mean

import torch

from bench import smol

SCALE = "s = quantize.scale(group: {0}, data: calib)"
METHODS = {
    "round, scales: range": "quantize.round(group: {0}, scales: range)",
    "round": "quantize.round(group: {0})",
    "gptq, as published": "quantize.gptq(group: {0}, data: calib, scales: range, order: given, sweeps: 0)",
    "gptq, sweeps: 0": "quantize.gptq(group: {0}, data: calib, sweeps: 0)",
    "gptq": "quantize.gptq(group: {0}, data: calib)",
    "gptq, sweeps: 8": "quantize.gptq(group: {0}, data: calib, sweeps: 8)",
    "scale, round": "quantize.round(group: {0})",
    "scale, gptq": "quantize.gptq(group: {0}, data: calib)",
}


def print_perplexities_by_quantizer() -> None:
    from effc.compiler.core.fingerprint import machine_facts

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    folder = options.folder.resolve()
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), flush=True)
    print(
        f"calibrated on {options.samples} x 256 tokens, seeds {options.seeds}; perplexity, mean and range", flush=True
    )
    line = "{:<22}{:>6}{:>7}" + 2 * "{:>24}"
    print(line.format("", "group", "bits", *smol.HELD_OUT), flush=True)
    model = smol.base(folder, "bfloat16")
    build = smol.build_of(folder, "four", "", model=model)
    dense = smol.perplexities(smol.finished(build), build.ctx)
    print(line.format("dense", "", "16", *(f"{p:.3f}" for p in dense)), flush=True)
    for group in options.groups:
        for name in options.only:
            found = []
            for seed in options.seeds if "data" in METHODS[name] or "scale, " in name else [0]:
                steps = [SCALE] * name.startswith("scale, ") + [f"q = {METHODS[name]}"]
                words = "\n  ".join(steps).format(group)
                build = smol.build_of(folder, "four", words, model=model, samples=options.samples, seed=seed)
                program = smol.finished(build)
                bits = program.notes[-1]["bits_per_weight"]
                found.append(smol.perplexities(program, build.ctx))
                print(f"  seed {seed}: {found[-1][0]:.3f} {found[-1][1]:.3f}", flush=True)
            cells = [f"{mean(p):.3f} ({min(p):.3f}..{max(p):.3f})" for p in zip(*found, strict=True)]
            print(line.format(name, group, bits, *cells), flush=True)


if __name__ == "__main__":
    print_perplexities_by_quantizer()

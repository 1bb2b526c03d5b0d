"""Print perplexity of SmolLM2 with zeros by every pass of `sparsify`, before and after a short training of what is left.

    python -m bench.sparse_healed FOLDER [--steps 40] [--samples 16] [--only NAME ...] [--shares ...]
        [--quick] [--json FILE]

The model is that of smol.py, in bfloat16. Masks look at `--samples` rows of 256 tokens; training is `tune.heal(method:
full)`, which keeps zeros, of 4 rows of 128 tokens a step, none with `--steps 0`. Nothing decides by the held-out texts.
FOLDER keeps what is done, so that a run that was stopped goes on. `--quick` shows that all of it works and which way it
goes: half of the weights and 2:4, one allocation, 8 samples, 8 steps.
"""

import argparse
import os
from pathlib import Path

import torch

from bench import smol
from bench.json_table import add_json_option, write_table

METHODS = {
    "magnitude": "sparsify.magnitude({0}, each: row)",
    "wanda": "sparsify.wanda({0}, data: calib)",
    "sparsegpt": "sparsify.sparsegpt({0}, data: calib)",
    "admm": "sparsify.admm({0}, data: calib)",
    "admm, owl": "sparsify.admm({0}, data: calib, allocation: owl)",
    "admm, searched": "sparsify.admm({0}, data: calib, allocation: searched)",
}
SHARES = {
    **{share: f"sparsity: {share} of weights" for share in ("30%", "50%", "60%", "70%")},
    "2:4": 'sparsity: 50% of weights, pattern: "2:4"',
}
HEAL = "fit = tune.heal(data: train, method: full, steps: {0}, batch: 4, lr: 5e-5, save: 20)"


def main() -> None:
    from effc.compiler.core.fingerprint import machine_facts

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--shares", nargs="+", default=list(SHARES), choices=list(SHARES))
    parser.add_argument("--quick", action="store_true")
    add_json_option(parser)
    options = parser.parse_args()
    if options.quick:
        options.steps, options.samples, options.shares = 8, 8, ["50%", "2:4"]
        options.only = [name for name in options.only if "," not in name]
    folder = options.folder.resolve()
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), flush=True)
    print(
        f"calibrated on {options.samples} x 256 tokens, healed for {options.steps} steps of 4 x 128; perplexity",
        flush=True,
    )
    line = "{:<16}{:>6}{:>8}{:>14}{:>9}{:>16}{:>9}"
    print(line.format("", "", "zeros", *smol.HELD_OUT, *(f"healed, {name}" for name in smol.HELD_OUT)), flush=True)
    model, heal = smol.base(folder, "bfloat16"), [HEAL.format(options.steps)] if options.steps else []
    columns = ("zeros", "masks", *smol.HELD_OUT, *(f"{name}, healed" for name in smol.HELD_OUT))
    lines = []
    cases = [(m, s) for s in options.shares for m in options.only if not (s == "2:4" and "," in m)]
    for name, share in [("dense", ""), *cases]:
        made = [] if name == "dense" else [f"sps = {METHODS[name].format(SHARES[share])}"]
        more = {"model": model, "samples": options.samples}
        build = smol.build_of(folder, f"sparse{os.getpid()}", "\n  ".join([*made, *heal]), **more)
        program, before, after = smol.perplexities_around_healing(build, bool(heal))
        zeros = next((note["sparsity"] for note in program.notes if "sparsity" in note), 0.0)
        found = before + after
        lines.append([share, name, *(f"{p:.4g}" for p in found), *[""] * (4 - len(found))])
        write_table(options.json, columns, lines)
        print(
            line.format(name, share, f"{zeros:.1%}", *(f"{p:.2f}" for p in found), *[""] * (4 - len(found))), flush=True
        )


if __name__ == "__main__":
    main()

"""Print perplexity of SmolLM2 after `prune.multi`, before and after a short training of what is left.

    python -m bench.pruned_healed FOLDER [--shares 10 15 20] [--seeds 0 1 2] [--steps 20] [--samples 8] [--json FILE]

The model is that of smol.py, in bfloat16. Cuts are decided by perplexity of `--samples` rows of 256 tokens, with
estimates; training is `tune.heal(method: full)` of 4 rows of 128 tokens a step. A seed chooses the rows that decide,
what the model writes to rank and refit by, and the order of the rows trained on. The held-out texts decide nothing.
FOLDER keeps what is done, so that a run that was stopped goes on.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from effc.compiler.analysis.discovery.discover import skeleton_of

from bench import smol
from bench.json_table import add_json_option, write_table

CUT = "cut = prune.multi(remove: {0}% of params, group: 128, score: perplexity(calib), estimate: taylor, together: 8)"
HEAL = "fit = tune.heal(data: train, method: full, steps: {0}, batch: 4, lr: 5e-5, save: 20)"


def main() -> None:
    from effc.compiler.analysis.planning.shrink import param_count
    from effc.compiler.core.fingerprint import machine_facts

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shares", type=int, nargs="+", default=[10, 15, 20])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=8)
    add_json_option(parser)
    options = parser.parse_args()
    folder, began = options.folder.resolve(), time.monotonic()
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), flush=True)
    model, found, lines = smol.base(folder, "bfloat16"), {}, []
    columns = ("removed", "seed", "M parameters", *smol.HELD_OUT, *(f"{name}, healed" for name in smol.HELD_OUT))
    for share in [0, *options.shares]:
        for seed in options.seeds:
            steps = [CUT.format(share)] if share else []
            words = "\n  ".join([*steps, HEAL.format(options.steps)])
            more = {"model": model, "samples": options.samples, "seed": 7 + seed, "chance": seed}
            build = smol.build_of(folder, f"pruned{os.getpid()}", words, **more)
            program, before, after = smol.perplexities_around_healing(build, True)
            row = [param_count(skeleton_of(program)) / 1e6, *before, *after]
            found.setdefault(share, []).append(row)
            lines.append([f"{share}%", str(seed), f"{row[0]:.1f}", *(f"{value:.2f}" for value in row[1:])])
            write_table(options.json, columns, lines)
            print(share, seed, *(f"{value:.2f}" for value in row), f"{time.monotonic() - began:.0f} s", flush=True)
    print("\n| removed | M params |", " | ".join((*smol.HELD_OUT, *(f"{n}, healed" for n in smol.HELD_OUT))), "|")
    print("|---" * 6 + "|")
    for share, rows in found.items():
        size, *values = zip(*rows, strict=True)
        cells = [f"{statistics.mean(c):.2f} ({min(c):.2f}–{max(c):.2f})" for c in values]
        print(f"| {share}% | {statistics.mean(size):.1f} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()

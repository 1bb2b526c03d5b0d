"""Print what healing gives back on the embedded model, as a table.

    python tests/bench/heal.py [--steps N]

The model is pruned in two ways and healed in four, each with three seeds, on calib.txt (139 KB); perplexity is
measured on heldout.txt, which nothing learns from. Seeds decide the order of rows and the adapters' start; the
pruned model is the same for all. "regained" is the share of the lost nats per token that healing gives back.
"""

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
ZOO = ROOT / "recipes/zoo/tiny-llama"
CUTS = {
    "60% of MLP channels": "prune.channels(keep: 60% of channels, align: 32)",
    "3 branches removed": "prune.blocks(remove: 3, score: perplexity(score))",
}
HEALS = {
    "lora": "method: lora, lr: 3e-3",
    "full": "method: full, lr: 1e-3",
    "lora, distill 50%": "method: lora, lr: 3e-3, distill: 50%",
    "full, distill 50%": "method: full, lr: 1e-3, distill: 50%",
}
SEEDS = (0, 1, 2)
RECIPE = """effspec 1
model base    = zoo("tiny-llama")
data  calib   = text("{zoo}/calib.txt", length: 128)
data  score   = text("{zoo}/calib.txt", samples: 8, length: 128, seed: 7)
data  heldout = text("{zoo}/heldout.txt", length: 256)
pipeline lean(base) {{
  cut = {cut}
  fit = tune.heal(data: calib, steps: {steps}, batch: 8, {heal})
}}
emit lean {{ hf("lean", form: compact) }}
"""


def measured(folder: Path, cut: str, heal: str, steps: int, seed: int) -> tuple[list[float], float]:
    """(held-out perplexity of the original, pruned, healed), seconds of healing."""
    from effc.compiler import api
    from effc.compiler.capture import capture
    from effc.compiler.evaluate import nll
    from effc.dsl.values import DataRef

    recipe = folder / "heal.effspec"
    recipe.write_text(RECIPE.format(zoo=ZOO, cut=CUTS[cut], heal=HEALS[heal], steps=steps))
    session = api.session(recipe, cache_dir=folder / "cache", threads=1, seed=seed)
    (plan,) = api.plans(session)
    ctx = session.context(plan.recipe, plan.pipeline)
    rows = ctx.rows(DataRef("heldout"))
    program, found, seconds = capture(ctx.origin.load()), [], 0.0

    def measure() -> None:
        nats, tokens = nll(program.model, rows)
        found.append(math.exp(nats / tokens))

    measure()
    for stage in plan.stages:
        ctx.workdir = folder / "work" / stage.key
        ctx.workdir.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        ctx.shelf.make("pass", stage.call).run(program, ctx)
        seconds = time.perf_counter() - started
        measure()
    return found, seconds


def row(cut: str, heal: str, runs: list[tuple[list[float], float]]) -> list[str]:
    original, pruned, _ = runs[0][0]
    after = [values[2] for values, _ in runs]
    lost = math.log(pruned / original)
    regained = [math.log(pruned / value) / lost for value in after]
    return [f"{cut}, {heal}", f"{original:.1f}", f"{pruned:.1f}",
            f"{statistics.mean(after):.1f} ({min(after):.1f} .. {max(after):.1f})",
            f"{statistics.mean(regained):.0%}", f"{statistics.mean(s for _, s in runs):.0f}"]


def main() -> None:
    from effc.compiler.fingerprint import machine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in machine().items()))
    head = ["pruned, healed", "original", "pruned", "healed (3 seeds)", "regained", "s"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for cut in CUTS:
            for heal in HEALS:
                rows.append(row(cut, heal, [measured(Path(folder), cut, heal, steps, seed) for seed in SEEDS]))
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    print(f"\nheld-out perplexity of tiny-llama, {steps} steps of 8 x 128 tokens, one thread")
    for line in [head, *rows]:
        print("  " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w)
                               for i, (c, w) in enumerate(zip(line, widths, strict=True))))


if __name__ == "__main__":
    main()

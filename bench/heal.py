"""Print what healing gives back on the embedded model, as a table.

    python -m bench.heal [--steps N]

The model is pruned in two ways and healed in four, each with three seeds, on calib.txt (139 KB); perplexity
is measured on heldout.txt, which nothing learns from. Seeds decide the order of rows and the adapters' start;
the pruned model is the same for all. "regained" is the share of the lost nats per token that healing gives back.
"""

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from effc.compiler.driver.pipeline import Build

ROOT = Path(__file__).parents[1]
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


def heldout_perplexity(program, ctx) -> float:
    """On all of heldout.txt."""
    from effc.compiler.models.rows.forward import total_nll
    from effc.dsl.checker.values import DataRef

    nats, tokens = total_nll(program.model, ctx.rows(DataRef("heldout")))
    return math.exp(nats / tokens)


def perplexity_and_seconds_after_healing(
    folder: Path, cut_step: str, heal_step: str, steps: int, seed: int
) -> tuple[float, float]:
    """Held-out perplexity after healing, and what that took in seconds."""
    build = build_of(folder, cut_step, heal_step, steps, seed)
    first, last = build.plan.stages
    build.run_step_unless_cached(first)
    build.load_outcome(first.key)
    started = time.perf_counter()
    build.run_step_unless_cached(last)
    seconds = time.perf_counter() - started
    return heldout_perplexity(build.load_outcome(last.key).program, build.ctx), seconds


def build_of(folder: Path, cut_step: str, heal_step: str, steps: int, seed: int) -> "Build":
    """The build of a recipe; one cache for all, so that the same pruning is done once a seed."""
    from effc.compiler.core.cache import Cache
    from effc.compiler.driver import api
    from effc.compiler.driver.pipeline import Build

    recipe = folder / "heal.effspec"
    recipe.write_text(RECIPE.format(zoo=ZOO, cut=CUTS[cut_step], heal=HEALS[heal_step], steps=steps))
    session = api.open_session(recipe, cache_dir=folder / "cache", threads=1, seed=seed)
    (plan,) = api.plan_all_pipelines(session)
    return Build(plan, session.context(plan.recipe, plan.pipeline), Cache(session.settings.cache_dir))


def main() -> None:
    from effc.compiler.core.fingerprint import machine_facts

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()))
    print(f"\nheld-out perplexity of tiny-llama, {steps} steps of 8 x 128 tokens, one thread")
    line = "  {:<22}{:<20}{:>9}{:>9}{:>24}{:>10}{:>6}"
    print(line.format("pruned", "healed by", "original", "pruned", "healed, three seeds", "regained", "s"))
    with tempfile.TemporaryDirectory() as folder:
        for cut in CUTS:
            build = build_of(Path(folder), cut, "lora", steps, SEEDS[0])
            original = heldout_perplexity(build.load_outcome(build.plan.identity).program, build.ctx)
            build.run_step_unless_cached(build.plan.stages[0])
            pruned = heldout_perplexity(build.load_outcome(build.plan.stages[0].key).program, build.ctx)
            for heal in HEALS:
                after, seconds = zip(
                    *(perplexity_and_seconds_after_healing(Path(folder), cut, heal, steps, s) for s in SEEDS),
                    strict=True,
                )
                left = math.log(statistics.geometric_mean(after) / original)
                regained = 1 - left / math.log(pruned / original)
                print(
                    line.format(
                        cut,
                        heal,
                        f"{original:.1f}",
                        f"{pruned:.1f}",
                        f"{statistics.mean(after):.1f} ({min(after):.1f} .. {max(after):.1f})",
                        f"{regained:.0%}",
                        f"{statistics.mean(seconds):.0f}",
                    ),
                    flush=True,
                )


if __name__ == "__main__":
    main()

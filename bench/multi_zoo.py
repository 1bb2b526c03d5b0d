"""Print what prune.multi costs and gives on the embedded model: racing beside the published search, three seeds.

    python -m bench.multi_zoo [--share 6.5 15] [--rows 8] [--split 44:52:4 40:50:10]

Scored on rows of 128 tokens of calib.txt, which the seed chooses; perplexity is of heldout.txt. Layer forwards are in
units of one layer over the scored rows; `naive` is what scoring every candidate by the whole model would have run.
"""

import argparse
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from effc.compiler.core.cache import Cache
from effc.compiler.core.events import Recorded
from effc.compiler.core.fingerprint import machine_facts
from effc.compiler.driver.api import open_session, plan_all_pipelines
from effc.compiler.driver.pipeline import Build

ZOO = Path(__file__).parents[1] / "recipes/zoo/tiny-llama"
SEEDS = (0, 1, 2)
EXACT = ", split: {{blocks: {}, channels: {}, heads: {}}}, search: exact"
RECIPE = """effspec 1
model base = zoo("tiny-llama")
data calib = text("{zoo}/calib.txt", samples: {rows}, length: 128, seed: {seed})
data heldout = text("{zoo}/heldout.txt", samples: 32, length: 256, seed: 7)
pipeline lean(base) {{ slim = prune.multi(remove: {share:g}% of params, group: 32, score: perplexity(calib){more}) }}
expect lean {{ perplexity(heldout) <= 1e9 }}
emit lean {{ hf("lean") }}
"""


def perplexity_and_forwards(removed_share: float, more: str, rows: int, seed: int) -> tuple[float, float, float]:
    """Held-out perplexity, layer forwards, and those of a naive search."""
    costs: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        recipe, cache = Path(name) / "zoo.effspec", Path(name) / "cache"
        recipe.write_text(RECIPE.format(zoo=ZOO, rows=rows, seed=seed, share=removed_share, more=more))
        opened = open_session(recipe, cache_dir=cache, threads=1)
        opened.settings = replace(
            opened.settings, on_event=lambda e: isinstance(e, Recorded) and costs.update({e.name: e.value})
        )
        (plan,) = plan_all_pipelines(opened)
        build = Build(plan, opened.context(plan.recipe, plan.pipeline), Cache(cache))
        build.run_step_unless_cached(plan.stages[0])
        model = build.load_outcome(plan.stages[0].key).program.model.eval()
        value = build.ctx.metric(plan.pipeline.expects[0].metric).measure(model, build.ctx)
    return value, costs["layer forwards"], costs["layer forwards, were every candidate scored by the whole model"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, nargs="+", default=[6.5, 15])
    parser.add_argument("--rows", type=int, nargs="+", default=[8])
    parser.add_argument("--split", nargs="+", default=["44:52:4"], help="of blocks, channels and heads, for `exact`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), f"seeds {SEEDS}", sep=", ")
    print("share  rows  method          perplexity           layer forwards    naive")
    methods = {"racing": ""} | {f"exact {split}": EXACT.format(*split.split(":")) for split in options.split}
    for share, rows in product(options.share, options.rows):
        for method, more in methods.items():
            found = [perplexity_and_forwards(share, more, rows, seed) for seed in SEEDS]
            cells = ["  ".join(f"{row[i]:{form}}" for row in found) for i, form in enumerate((".2f", ".0f", ".0f"))]
            print(f"{share:4g}%  {rows:4}  {method:14}  {cells[0]}  {cells[1]}  {cells[2]}", flush=True)


if __name__ == "__main__":
    main()

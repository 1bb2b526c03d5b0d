"""Hypervolume against evaluations of the searches over a family, on the zoo's tiny Llama.

    python -m bench.search [--seeds 3] [--evals 60] [--steps 60]

The zoo's model is tiny: what it shows is that the searches work and how they compare on one small space, nothing
about a model that is worth searching. The hypervolume is of perplexity and parameters, both as shares of the largest
choice's and below (2, 1), as a share of what all fronts that were found beat together: 1 would be the front of all.
"""

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path

import torch
from effc.compiler.inputs.sources.zoo import zoo_folders_by_name
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.outcome import Model
from effc.compiler.transforms.supernet.explorer import Explorer, Objective, non_dominated
from effc.compiler.transforms.supernet.family import Family
from effc.dsl.checker.values import DataRef, MetricRef, Ratio
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.recipes_in_memory import SCORE, context_of, recipe_of
from tests.worlds import defaults

METHODS = ("random", "hill", "predict", "nsga2")
AT = (10, 20, 40, 60)
REFERENCE = (2.0, 1.0)  # of the largest choice's perplexity and parameters


def rows(folder: Path, name: str, count: int, length: int = 64) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder)((folder / name).read_text(), return_tensors="pt").input_ids[0]
    return ids[: count * length].view(count, length)


def family_of(folder: Path, work_folder: Path, steps: int) -> tuple[Family, object]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    args = {
        "channels": [Ratio(1.0), Ratio(0.75), Ratio(0.5)],
        "heads": [Ratio(1.0), Ratio(0.5)],
        "depth": "blocks",
        "data": DataRef("rows"),
        "steps": steps,
        "sandwich": True,
        "lr": 1e-3,
    }
    recipe = recipe_of([("net", "supernet.elastic", {**defaults("pass", "supernet.elastic"), **args})])
    ctx = context_of(work_folder, model, recipe, rows(folder, "calib.txt", 32))
    step = ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call)
    net = step.result_of(Model(capture(copy.deepcopy(model))), ctx)
    recipe = recipe_of([])
    ctx = context_of(work_folder, model, recipe, rows(folder, "heldout.txt", 4))
    return net, ctx


def hypervolume(values: list[tuple[float, float]]) -> float:
    """The area that points beat below the reference."""
    front = sorted(v for v in values if v[0] < REFERENCE[0] and v[1] < REFERENCE[1])
    total, low = 0.0, REFERENCE[1]
    for x, y in front:
        if y < low:
            total += (REFERENCE[0] - x) * (low - y)
            low = y
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evals", type=int, default=60)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        net, ctx = family_of(Path(zoo_folders_by_name()["tiny-llama"]), work, options.steps)
        objectives = [Objective.of(SCORE, ctx), Objective.of(MetricRef("params"), ctx)]
        runs, began, evaluated = {}, time.monotonic(), set()
        for method in METHODS:
            for seed in range(options.seeds):
                runs[method, seed] = run_search(net, ctx, objectives, method, seed, options.evals)
                evaluated |= set(runs[method, seed])
        whole = Explorer(net, ctx, objectives, 1)
        with whole.open():
            top = whole.evaluate(net.space.genome(net.space.choice("largest")))
    scaled = {run: [(v[0] / top[0], v[1] / top[1]) for v in values.values()] for run, values in runs.items()}
    known = {(run, i): v for run, values in scaled.items() for i, v in enumerate(values)}
    best = hypervolume([known[name] for name in non_dominated(known)])
    print(f"{net.space.size:,} choices of {len(net.space.dims)} dimensions; {len(evaluated)} evaluated in ", end="")
    print(f"{time.monotonic() - began:.0f} s; share of the area below all fronts together, mean and range of seeds\n")
    print("| | " + " | ".join(f"{n} evaluations" for n in AT if n <= options.evals) + " |")
    print("|---" * (1 + sum(n <= options.evals for n in AT)) + "|")
    for method in METHODS:
        cells = []
        for n in (n for n in AT if n <= options.evals):
            found = [hypervolume(scaled[method, seed][:n]) / best for seed in range(options.seeds)]
            cells.append(f"{statistics.mean(found):.2f} ({min(found):.2f}–{max(found):.2f})")
        print(f"| `search.{method}` | {' | '.join(cells)} |")


def run_search(net: Family, ctx, objectives, method: str, seed: int, evals: int) -> dict:
    """What a method evaluated, in that order; searches share the journal, which changes nothing but the time."""
    import random

    word = f"search.{method}"
    args = {**defaults("pass", word), "measure": [SCORE, MetricRef("params")], "evals": evals}
    call = recipe_of([("few", word, args)]).pipelines["lean"].steps[0].call
    explorer = Explorer(net, ctx, objectives, evals)
    with explorer.open():
        ctx.registry.make("pass", call).explore(explorer, random.Random(seed))
    return explorer.known


if __name__ == "__main__":
    main()

"""Print perplexity of the embedded model behind narrower streams, narrower MLPs and a search, and how fast each decodes.

    python -m bench.hidden FOLDER [--keep 94 89 83] [--steps 50] [--speed 83] [--rounds 12]
                           [--model MODEL] [--align 8] [--group 32]

All keep the same share of the parameters: `prune.hidden` as it is, without refitting, and in Minitron's order;
`prune.channels` alike in all layers; `prune.multi`, whose layers differ. Each is measured before and after `--steps`
steps of `tune.heal(method: full, distill: 50%)` of 8 rows of 128 tokens. Text like what the model learned from is heldout.txt, text
unlike it are topics of Python's documentation; neither decides anything. Tokens per second of CPU time, one thread, of
a greedy answer of 64 tokens: torch on `hf`, and `native`; rounds take turns. FOLDER keeps what is done. `--model` is
another model of a recipe, as `hf("smol/base")`.
"""

import argparse
import math
import re
import statistics
import time
from pathlib import Path

import torch

from bench import smol

ZOO = Path(__file__).parents[1] / "recipes/zoo/tiny-llama"
ARMS = {
    "`prune.hidden`": "prune.hidden(keep: {keep}% of params, align: {align}, data: calib)",
    "without refitting": "prune.hidden(keep: {keep}% of params, align: {align}, data: calib, repair: false)",
    "Minitron's order, without refitting": (
        "prune.hidden(keep: {keep}% of params, align: {align}, data: calib, reorder: norms, repair: false)"
    ),
    "`prune.channels`, all layers alike": "prune.channels(keep: {keep}% of params, align: {align})",
    "`prune.multi`": "prune.multi(remove: {less}% of params, group: {group}, score: perplexity(calib))",
}
RECIPE = """effspec 1
model base = {model}
data train = text("{zoo}/calib.txt", length: 128, seed: 3)
data calib = text("{zoo}/calib.txt", samples: 16, length: 128, seed: 7)
data like = text("{zoo}/heldout.txt", samples: 32, length: 256, seed: 1)
data unlike = text("{docs}", samples: 20, length: 256, seed: 1)
pipeline lean(base) {{
  {steps}
}}
emit lean {{ hf("hf") native("native") }}
"""
HEAL = "fit = tune.heal(data: train, method: full, steps: {steps}, batch: 8, lr: 3e-4, distill: 50%)"
TEXTS = ("like", "unlike")


def session_of(folder: Path, model: str, steps: list[str]):
    from effc.compiler.driver import api

    recipe = folder / f"hidden{abs(hash(tuple(steps)))}.effspec"
    text = RECIPE.format(model=model, zoo=ZOO, docs=folder / "docs.txt", steps="\n  ".join(steps))
    recipe.write_text(text)
    return api.open_session(recipe, cache_dir=folder / "cache", threads=1)


def params_and_perplexities(folder: Path, model: str, steps: list[str]) -> tuple[int, list[float]]:
    """Parameters and perplexities behind some steps."""
    from effc.compiler.core.cache import Cache
    from effc.compiler.driver import api
    from effc.compiler.driver.pipeline import Build
    from effc.compiler.models.rows.forward import total_nll
    from effc.dsl.checker.values import DataRef

    opened = session_of(folder, model, steps)
    (plan,) = api.plan_all_pipelines(opened)
    build = Build(plan, opened.context(plan.recipe, plan.pipeline), Cache(opened.settings.cache_dir))
    program = smol.finished(build)
    sums = [total_nll(program.model, build.ctx.rows(DataRef(name))) for name in TEXTS]
    return sum(p.numel() for p in program.model.parameters()), [math.exp(nats / tokens) for nats, tokens in sums]


def tokens_per_cpu_second(
    folder: Path, model: str, steps_by_name: dict[str, list[str]], rounds: int
) -> dict[str, list[float]]:
    """Tokens per second of CPU time of each result: in torch, and in the native engine."""
    import effc
    from effc.compiler.driver import api

    models = {}
    for name, steps in steps_by_name.items():
        place = folder / re.sub(r"\W+", "-", f"speed {name}").strip("-")
        if not place.is_dir():
            api.build(session_of(folder, model, steps), place)
        models[name] = [effc.load(place / "hf"), effc.load(place / "native")]
    prompt = torch.arange(16)[None] + 5
    seconds: dict[tuple[str, int], list[float]] = {}
    for turn in range(rounds + 1):
        for name, engines in models.items():
            for i, engine in enumerate(engines):
                began = time.process_time()
                engine.generate(prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False)
                if turn:
                    seconds.setdefault((name, i), []).append(time.process_time() - began)
    return {name: [64 / statistics.median(seconds[name, i]) for i in range(2)] for name in models}


def main() -> None:
    from effc.compiler.core.fingerprint import machine_facts

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", type=int, nargs="+", default=[94, 89, 83])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--speed", type=int, nargs="*", default=[83], help="shares that are timed")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--align", type=int, default=8)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--model", default='zoo("tiny-llama")')
    options = parser.parse_args()
    folder = options.folder.resolve()
    smol.write_texts(folder)
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), flush=True)
    heal, cuts = HEAL.format(steps=options.steps), {"original": []}
    rows = [["original", "", *_params_and_perplexities_text(params_and_perplexities(folder, options.model, []))]]
    print(rows[0], flush=True)
    for keep in options.keep:
        for name, words in ARMS.items():
            numbers = {"keep": keep, "less": 100 - keep, "align": options.align, "group": options.group}
            steps = [f"cut = {words.format(**numbers)}"]
            before, after = (
                params_and_perplexities(folder, options.model, steps),
                params_and_perplexities(folder, options.model, [*steps, heal]),
            )
            rows.append(
                [
                    f"{name}, {keep}%",
                    f"{before[0] / 1e6:.2f}",
                    *_params_and_perplexities_text(before),
                    *_params_and_perplexities_text(after),
                ]
            )
            print(rows[-1], flush=True)
            if "without" not in name and keep in options.speed:
                cuts[f"{name}, {keep}%"] = steps
    print("\n| kept | M params | like | unlike | like, healed | unlike, healed |\n" + "|---" * 6 + "|")
    for row in rows:
        print("| " + " | ".join([*row, *[""] * (6 - len(row))]) + " |")
    if len(cuts) > 1:
        print("\n| result | torch, tokens/s | native, tokens/s |\n" + "|---" * 3 + "|")
        for name, (plain, native) in tokens_per_cpu_second(folder, options.model, cuts, options.rounds).items():
            print(f"| {name} | {plain:.0f} | {native:.0f} |")


def _params_and_perplexities_text(result: tuple[int, list[float]]) -> list[str]:
    return [f"{value:.1f}" for value in result[1]]


if __name__ == "__main__":
    main()

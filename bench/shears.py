"""Adapters on half of a model's weights (Shears, SQFT) beside adapters on all of it, on questions with answers to choose.

    python -m bench.shears DATA FOLDER [--task ARC-Easy] [--seeds 0 1 2] [--steps 200] [--train 800] [--dev 48]
                                 [--test 200] [--sparsity 50] [--model 'gguf("...")'] [--rows FILE] [--json FILE]

DATA     a folder of LLM-Adapters' tasks: TASK/train.json and TASK/test.json, "instruction" and "answer"; or of GSM8K:
         train.jsonl and test.jsonl with `--task gsm8k`, "question" and "answer"; or of SST-2: train.tsv and test.tsv
         with `--task sst2`, "sentence" and "label"
FOLDER   keeps what is done in its cache
--rows   the file of measured models with the answer to every question, to which a later run adds (FOLDER/rows.json)

Of commonsense tasks the accuracy on test questions, an answer chosen by likelihood; of GSM8K the perplexity of worked
solutions behind their questions, as 135 M parameters solve next to none. Seeds choose what is learned and in which
order, and which ranks a step draws. All adapters sit on q, k, v, up and down, of rank 32 and alpha 64, and learn the
answers alone; masks and grids look at questions with their answers. "beside LoRA": paired over questions and seeds that
both have, with a 95 % interval of questions.
LoRA     of one rank; on sparse weights it fills their zeros when it is merged, so that nothing stays sparse
NLS      ranks 32, 24, 16, a draw a step: the middle ones, or those of `search.hill` by the dev questions; fills zeros, too
merged   NLS whose adapters give nothing where weights are zero (SparsePEFT); int4: trained through a grid as well
"""

import argparse
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench import smol
from bench.json_table import add_json_option, write_table
from bench.paired import bits_text, difference_text
from bench.row_store import RowStore
from bench.tables import markdown

ON = 'on: "*.{q,k,v,up,down}_proj"'
LEARN = "data: train, steps: {steps}, batch: 8, lr: 3e-4"
ZEROS = "sps = sparsify.wanda(sparsity: {sparsity}% of weights, data: calib)\n  "
NLS = "net = supernet.lora(" + ON + ", ranks: [32, 24, 16], zeros: {zeros}, {more}" + LEARN + ")\n  "
LORA = "fit = tune.heal(" + ON + ", rank: 32, alpha: 64.0, dropout: 0.1, zeros: fill, " + LEARN + ")"
PICK = "fit = supernet.pick(ranks: middle)"
ROUTES = {
    "as it is": "",
    "LoRA": LORA,
    "sparse": ZEROS,
    "sparse, LoRA": ZEROS + LORA,
    "sparse, NLS, middle": ZEROS + NLS.replace("{zeros}", "fill").replace("{more}", "") + PICK,
    "sparse, NLS, searched": ZEROS
    + NLS.replace("{zeros}", "fill").replace("{more}", "")
    + "best = search.hill(measure: [{dev}], evals: 12, points: 1)",
    "sparse, NLS, merged": ZEROS + NLS.replace("{zeros}", "keep").replace("{more}", "") + PICK,
    "sparse, NLS, merged int4": ZEROS
    + NLS.replace("{zeros}", "keep").replace("{more}", "bits: 4, group: 64, ")
    + PICK
    + '\n  q = quantize.gptq(on: "*.{o,gate}_proj", data: calib, bits: 4, group: 64)',
}
RECIPE = """effspec 1
model base = {model}
{data}
pipeline lean(base) {{
  {steps}
}}
"""
ROWS = 'data {name} = choices("{file}.jsonl", samples: {samples}, seed: {seed}, length: 192)\n'
SOLVED = """data {name} = pairs("{file}.jsonl", prompt: "prompt", join: " ", answer: "answer", length: 256, longer: drop,
    samples: {samples}, seed: {seed})
"""


def read_records(folder: Path, task: str, split: str) -> list[dict]:
    """Questions with options and the right one; of GSM8K with worked solutions."""
    if task == "sst2":
        lines = (folder / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[1:]
        return [review(*line.split("\t")) for line in lines if line]
    if task == "gsm8k":
        return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    records = []
    for one in json.loads((folder / task / f"{split}.json").read_text(encoding="utf-8")):
        options = re.search(r"Answer format: (\S+)", one["instruction"])
        assert options, f"{one['instruction'][:60]} has no options"
        records.append({"question": one["instruction"], "options": options[1].split("/"), "answer": one["answer"]})
    return records


def review(sentence: str, label: str) -> dict:
    options = ["negative", "positive"]
    return {"question": f"Review: {sentence.strip()}\nSentiment:", "options": options, "answer": options[int(label)]}


def write_splits(source: Path, folder: Path, task: str) -> None:
    """Every tenth of what was meant for training is what a search may look at."""
    learned = read_records(source, task, "train")
    parts = {"train": [r for i, r in enumerate(learned) if i % 10], "dev": learned[::10]}
    for name, some in {**parts, "test": read_records(source, task, "test")}.items():
        some = [{**r, "prompt": f"Question: {r['question']}\nAnswer:"} for r in some]  # as `choices` lays them out
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)), encoding="utf-8")


def run_route(folder: Path, name: str, options: argparse.Namespace, seed: int) -> tuple[Any, Any]:
    """The program at the end of a route, and the context to measure it in."""
    from effc.compiler.core.cache import Cache
    from effc.compiler.driver import api
    from effc.compiler.driver.pipeline import Build

    line = SOLVED if options.task == "gsm8k" else ROWS
    counts = {"train": (options.train, seed), "dev": (options.dev, 0), "test": (options.test, 0)}
    layouts = {"train": SOLVED, "dev": line, "test": line}
    data = "".join(layouts[n].format(name=n, file=n, samples=count, seed=s) for n, (count, s) in counts.items())
    data += (SOLVED if options.task == "gsm8k" else ROWS).format(name="calib", file="train", samples=160, seed=seed)
    steps = ROUTES[name]
    for key, value in {
        "steps": options.steps,
        "sparsity": options.sparsity,
        "dev": measure_of(options.task, "dev"),
    }.items():
        steps = steps.replace(f"{{{key}}}", str(value))
    path = folder / "shears.effspec"
    path.write_text(RECIPE.format(model=options.model, data=data, steps=steps), encoding="utf-8")
    session = api.open_session(path, cache_dir=folder / "cache", threads=torch.get_num_threads(), seed=seed)
    (plan,) = api.plan_all_pipelines(session)
    build = Build(plan, session.context(plan.recipe, plan.pipeline), Cache(session.settings.cache_dir))
    for stage in plan.stages:
        build.run_step_unless_cached(stage)
    outcome: Any = build.load_outcome(plan.stages[-1].key if plan.stages else plan.identity)
    return (outcome.load(outcome.points[0]) if hasattr(outcome, "points") else outcome.program), build.ctx


def measure_of(task: str, rows: str) -> str:
    return f"{'perplexity' if task == 'gsm8k' else 'choice'}({rows})"


def measured_row(program: Any, ctx: Any, task: str) -> dict[str, Any]:
    """Value on the test rows, of questions with options the answers as well, and the share of zeros."""
    from effc.dsl.checker.values import DataRef, MetricRef

    metric = ctx.metric(MetricRef("perplexity" if task == "gsm8k" else "choice", (("data", DataRef("test")),)))
    weights = [p for name, p in program.model.named_parameters() if name.endswith("_proj.weight")]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    trained = [note["trained"] for note in program.notes if "trained" in note]
    row: dict[str, Any] = {"zeros": zeros, "trained": trained[-1] if trained else 0}
    if task == "gsm8k":
        return row | {"value": metric.measure(program.model, ctx)}
    right = metric.score_rows(program.model, ctx).sums
    return row | {"value": statistics.fmean(right), "questions": len(right), "right": bits_text(right)}


def table_of(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["route"], []).append(row)
    lines = []
    for route in (name for name in ROUTES if name in groups):
        group = groups[route]
        values = [row["value"] for row in group]
        spread = f"{statistics.mean(values):.3f}"
        spread += f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else ""
        trained = f"{group[-1]['trained'] / 1e6:.1f} M" if group[-1]["trained"] else ""
        seeds = ", ".join(str(row["seed"]) for row in group)
        lines.append(
            (
                route,
                seeds,
                spread,
                "" if route == "LoRA" else difference_text(group, groups.get("LoRA", [])),
                f"{group[-1]['zeros']:.1%}",
                trained,
            )
        )
    return lines


def main() -> None:
    from effc.compiler.core.fingerprint import machine_facts

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", default="ARC-Easy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for name, value in (("steps", 200), ("train", 800), ("dev", 48), ("test", 200), ("sparsity", 50)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", nargs="+", default=list(ROUTES), choices=list(ROUTES))
    parser.add_argument("--model", default="")
    parser.add_argument("--rows", type=Path)
    add_json_option(parser)
    options = parser.parse_args()
    setting = {name: getattr(options, name) for name in ("model", "task", "steps", "train", "dev", "test", "sparsity")}
    options.model = options.model or f'gguf("{smol.gguf_path()}")'
    folder, began = options.folder.resolve(), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    write_splits(options.data, folder, options.task)
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), flush=True)
    store = RowStore(options.rows or folder / "rows.json", setting)
    done = {(row["route"], row["seed"]) for row in store.rows}
    for seed, route in ((s, r) for s in options.seeds for r in options.only if (r, s) not in done):
        row = {"route": route, "seed": seed} | measured_row(*run_route(folder, route, options, seed), options.task)
        store.add(row)
        print(f"seed {seed}: {route}: {row['value']:.3f}, {time.monotonic() - began:.0f} s", flush=True)
    measure = measure_of(options.task, options.task)
    columns = ("", "seeds", f"{measure}, mean and range", "beside LoRA", "zeros", "trained")
    lines = table_of(store.rows)
    print(markdown([columns, *lines]))
    write_table(options.json, columns, lines)


if __name__ == "__main__":
    main()

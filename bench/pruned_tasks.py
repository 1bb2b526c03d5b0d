"""Accuracy on whole test sets and perplexity of three texts of SmolLM2-135M, pruned in four ways by three seeds.

    python -m bench.pruned_tasks FOLDER COMMONSENSE [--methods racing exact blocks layers] [--shares 0.1]
                                 [--seeds 0 1 2] [--heal STEPS] [--json FILE]

Methods, model and the rows that decide are those of bench/multi.py. COMMONSENSE holds ARC-Easy, ARC-Challenge,
openbookqa and boolq, each with a test.json in the LLM-Adapters form: 7,318 questions, counted as lm-evaluation-harness
counts (`acc_norm`; `acc` for boolq, which is asked without its passage). Texts are other pages than those that decide
(`docs`), the King James Bible and source code of Python's library: 16,384 tokens each. Both run in bfloat16.

FILE keeps the answers to every question, a row a model, so that a run that was stopped goes on. An interval is of the
difference of two methods over questions, for the seeds that both have, whose answers are averaged first; seeds have their range.
"""

import argparse
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import torch
from effc.compiler.core.fingerprint import machine_facts
from effc.compiler.driver.pipeline import Build
from effc.compiler.models.rows.forward import total_nll
from effc.dsl.checker.values import DataRef, MetricRef

from bench import multi
from bench.frontier import code, sources_of
from bench.paired import bits_text
from bench.task_answers import TASKS, TEXTS, pruned_task_rows

TEXT = 'data {name} = text("{path}", samples: 64, length: 256, seed: 1)'


def question(record: dict[str, str]) -> dict[str, Any]:
    """A record of the LLM-Adapters form as question, options and the answer's number."""
    if record["answer"] in ("true", "false"):
        text = record["instruction"].partition("question: ")[2].partition("\n\nAnswer format")[0]
        return {"question": text, "options": ["no", "yes"], "answer": int(record["answer"] == "true")}
    match = multi.QUESTION.search(record["instruction"])
    assert match, record["instruction"]
    options = re.split(r"\s*Answer\d+: ", " Answer1: " + match[2])[1:]
    return {"question": match[1], "options": options, "answer": int(record["answer"].removeprefix("answer")) - 1}


def write_inputs(folder: Path, commonsense: Path) -> str:
    """Texts and questions in `folder`, and the declarations of them."""
    lines = [multi.write_texts(folder, None, 0)]
    (folder / "code.txt").write_text(sources_of(code))
    for name, path in (("long_docs", "docs.txt"), ("long_kjv", multi.ROOT / "recipes/zoo/tiny-llama/heldout.txt")):
        lines.append(TEXT.format(name=name, path=path))
    lines.append(TEXT.format(name="long_code", path="code.txt"))
    for task in TASKS:
        records = json.loads((commonsense / task / "test.json").read_text())
        (folder / f"{task}.jsonl").write_text("\n".join(json.dumps(question(record)) for record in records))
        lines.append(f'data {identifier(task)} = choices("{task}.jsonl")')
    return "\n".join(lines)


def identifier(task: str) -> str:
    return task.replace("-", "_").lower()


def pruned(build: Build, method: str, share: float) -> torch.nn.Module:
    if method == "original":
        return build.ctx.origin.load()
    if method == "layers":
        return multi.drop_similar_layers(build, share)
    return multi.run_build(build)[0]


def measure(build: Build, model: torch.nn.Module) -> dict[str, Any]:
    """Perplexities, and for each task the right answers as bits in hexadecimal, the first question's highest."""
    ctx, row = build.ctx, {}
    row["params"] = sum(p.numel() for p in dict.fromkeys(model.parameters()))
    model.to(torch.bfloat16)
    for name in TEXTS:
        nats, tokens = total_nll(model, ctx.rows(DataRef(f"long_{name}")))
        row[name] = math.exp(nats / tokens)
    for task, normalised in TASKS.items():
        metric = MetricRef("choice", (("data", DataRef(identifier(task))), ("normalised", normalised)))
        right = ctx.metric(metric).score_rows(model, ctx).sums
        row[task] = bits_text(right)
        row[f"{task} questions"] = len(right)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("commonsense", type=Path)
    methods = ("layers", "blocks", "racing", "exact")
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--heal", type=int, default=0, help="steps of training behind each cut")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.heal and "layers" in options.methods:
        parser.error("`layers` is no recipe, so that nothing is trained behind it: leave it out of --methods")
    torch.set_num_threads(1)
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path = options.json or folder / "rows.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    declarations = write_inputs(folder, options.commonsense)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), flush=True)
    jobs = [("original", 0.0, 0, 0)]
    jobs += [(m, s, n, options.heal) for n in options.seeds for s in options.shares for m in options.methods]
    done = {(row["method"], row["share"], row["seed"], row["heal"]) for row in rows}
    for method, share, seed, heal in (job for job in jobs if job not in done):
        began = time.monotonic()
        steps = multi.STEPS.get(method, multi.STEPS["racing"]).format(
            share=f"{100 * (share or 0.1):g}", left="", group=128, split=("44", "52", "4")
        )
        steps += multi.HEAL.format(heal=heal) if heal else ""
        build = multi.build_of(folder, steps, seed, 2, declarations, folder / "cache", False)
        model = pruned(build, method, share).eval()
        cut = time.monotonic()
        row = {"method": method, "share": share, "seed": seed, "heal": heal, **measure(build, model)}
        rows.append({**row, "seconds": [round(cut - began), round(time.monotonic() - cut)]})
        path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        print(method, share, seed, *(f"{row[name]:.2f}" for name in TEXTS), *rows[-1]["seconds"], flush=True)
    for line in pruned_task_rows(rows):
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()

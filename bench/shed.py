"""Parts removed from a model of state spaces (Mamba-Shedder): perplexity, tokens predicted right, and speed.

    python -m bench.shed MODEL FOLDER [--kinds scans blocks ...] [--heal 100] [--seed 0] [--json FILE]

MODEL    tiny-mamba2 or tiny-hybrid of the zoo, or a folder that recipes/zoo/train_tiny_ssm.py wrote
FOLDER   keeps what is done: caches, and measured rows in rows.json

Searches are racing ones, scored on 8 rows of calib.txt. Perplexity, and the share of tokens that the model expects most
(greedy decoding's), are of 48 rows of 256 tokens of heldout.txt, which nothing learns from or decides by; "kept" is that
share beside the original's, with a 95 % interval of rows. Speeds are those of reading 256 tokens and of decoding one,
batch 1, one thread, scans on effc's kernels as `effc.load` runs them: the median of five ratios, original and result in
turns. `--heal` trains all weights of each result for so many steps of 8 rows on calib.txt, half of the loss by the
original's predictions. "of naive" is the share of layer forwards beside scoring each candidate by the whole model.
"""

import argparse
import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning import shrink
from effc.compiler.core.cache import Cache
from effc.compiler.core.events import Recorded
from effc.compiler.core.fingerprint import machine_facts
from effc.compiler.driver import api
from effc.compiler.driver.pipeline import Build
from effc.compiler.evaluation.timing import WARMUP, timing_conditions
from effc.compiler.ir.layers.fast_mixers import use_mixer_kernels
from effc.compiler.ir.program import Program
from effc.compiler.models.rows.forward import total_nll
from effc.dsl.checker.values import DataRef, MetricRef
from torch import nn

from bench.json_table import add_json_option, write_table
from bench.paired import Z, paired_difference
from bench.row_store import RowStore
from bench.tables import markdown

TEXTS = Path(__file__).parents[1] / "recipes/zoo/tiny-llama"
SCORE = "score: perplexity(score)"
SHARES = (0.125, 0.25, 0.34)  # of the layers
RECIPE = """effspec 1
model base    = {model}
data  calib   = text("{texts}/calib.txt", length: 128)
data  score   = text("{texts}/calib.txt", samples: 8, length: 128, seed: 7)
data  heldout = text("{texts}/heldout.txt", samples: 48, length: 256, seed: 7)
pipeline lean(base) {{
  cut = {step}
  fit = tune.heal(data: calib, steps: {heal}, batch: 8, method: full, lr: 2e-4, distill: 50%)
}}
"""
NAIVE = "layer forwards, were every candidate scored by the whole model"


def steps_by_kind(scans: int) -> dict[str, list[str]]:
    """Steps that remove parts, for a model of so many scans."""
    counts = sorted({max(1, round(share * scans)) for share in SHARES})
    return {
        "scans": [f"shed.ssm(remove: {n}, {SCORE})" for n in counts],
        "blocks": [f"shed.blocks(remove: {n}, {SCORE})" for n in counts],
        "heads": [f"shed.heads(keep: {k}% of heads, {SCORE})" for k in (75, 50)],
        "states": [f"shed.state(keep: {k}% of states, {SCORE})" for k in (75, 50)],
        "multi": [f"shed.multi(remove: {k}% of params, {SCORE})" for k in (5, 10, 20)],
    }


@dataclass(frozen=True)
class Shedding:
    """One model, its builds in a folder."""

    model: str
    folder: Path
    heal: int
    seed: int

    def build(self, step: str) -> Build:
        recipe = self.folder / "shed.effspec"
        source = f'hf("{Path(self.model).resolve()}")' if Path(self.model).is_dir() else f'zoo("{self.model}")'
        recipe.write_text(RECIPE.format(model=source, texts=TEXTS, step=step, heal=self.heal or 1), "utf-8")
        session = api.open_session(recipe, cache_dir=self.folder / "cache", threads=1, seed=self.seed)
        (plan,) = api.plan_all_pipelines(session)
        return Build(plan, session.context(plan.recipe, plan.pipeline), Cache(session.settings.cache_dir))

    def original(self) -> tuple[Program, Any]:
        build = self.build(f"shed.ssm(remove: 1, {SCORE})")
        program = build.load_outcome(build.plan.identity).program
        use_mixer_kernels(program.model)
        return program, build.ctx

    def measured_row(self, step: str, original: Program) -> dict[str, Any]:
        build, counts = self.build(step), {}

        def record(event: Any) -> None:
            if isinstance(event, Recorded):
                counts[event.name] = event.value

        build.ctx = replace(build.ctx, settings=replace(build.ctx.settings, on_event=record))
        began = time.process_time()
        build.run_step_unless_cached(build.plan.stages[0])
        row = {"seconds": time.process_time() - began, "naive": counts.get("layer forwards", 0) / counts.get(NAIVE, 1)}
        program = build.load_outcome(build.plan.stages[0].key).program
        use_mixer_kernels(program.model)
        row["params"] = shrink.param_count(skeleton_of(program)) / shrink.param_count(skeleton_of(original))
        for name, metric in (
            ("prefill", MetricRef("prefill.p50", (("prompt", 256),))),
            ("decode", MetricRef("decode.p50")),
        ):
            row[name] = time_ratio(build.ctx.metric(metric), original.model, program.model)
        row |= quality(program.model, build.ctx)
        if self.heal:
            build.run_step_unless_cached(build.plan.stages[1])
            healed = build.load_outcome(build.plan.stages[1].key).program.model
            row |= {f"healed {name}": value for name, value in quality(healed, build.ctx).items()}
        return row


@torch.no_grad()
def quality(model: nn.Module, ctx: Any) -> dict[str, Any]:
    """Perplexity, and for each held-out row the share of tokens that have the largest logit."""
    rows = ctx.rows(DataRef("heldout"))
    nats, tokens = total_nll(model, rows)
    right = [(model(row[None]).logits[0, :-1].argmax(-1) == row[1:]).float().mean().item() for row in rows]
    return {"perplexity": math.exp(nats / tokens), "right": right}


def time_ratio(metric: Any, original: nn.Module, result: nn.Module, times: int = 5) -> float:
    """The median of some races, each of medians: where memory comes to lie, and who else runs, sways a single one."""
    ratios = []
    for _ in range(times):
        clocks = [metric.clock(model) for model in (original, result)]
        taken: list[list[float]] = [[], []]
        with timing_conditions(original), timing_conditions(result):
            for turn in range(WARMUP + clocks[0].count):
                for i in (0, 1)[:: 1 if turn % 2 == 0 else -1]:
                    taken[i].append(clocks[i].step())
        before, after = (clock.value(seconds[WARMUP:]) for clock, seconds in zip(clocks, taken, strict=True))
        ratios.append(after / before)
    return statistics.median(ratios)


def kept(row: dict[str, Any], name: str, original: dict[str, Any]) -> str:
    """Accuracy beside the original's, in per cent."""
    base = statistics.fmean(original["right"])
    mean, error = paired_difference([row[name]], [original["right"]])
    return f"{100 * (1 + mean / base):.1f} ± {100 * Z * error / base:.1f}"


def table_lines(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line for each step; the first is the heads, the second the original."""
    original, *steps = rows
    is_healed = any("healed right" in row for row in steps)
    heads = ("", "parameters", "reading", "decoding", "perplexity", "right, %", "kept, %", "of naive")
    lines = [(*heads, *(("perplexity, healed", "kept, %") if is_healed else ()))]
    lines.append(
        ("original", "100%", "1", "1", f"{original['perplexity']:.2f}", right(original), *[""] * (2 + 2 * is_healed))
    )
    for row in steps:
        cells = [f"`{row['step'].replace(f', {SCORE}', '')}`", f"{row['params']:.1%}"]
        cells += [f"{1 / row[name]:.2f}" for name in ("prefill", "decode")]
        cells += [f"{row['perplexity']:.2f}", right(row), kept(row, "right", original), f"{row['naive']:.0%}"]
        if is_healed:
            cells += [f"{row['healed perplexity']:.2f}", kept(row, "healed right", original)]
        lines.append(tuple(cells))
    return lines


def right(row: dict[str, Any]) -> str:
    return f"{100 * statistics.fmean(row['right']):.1f}"


def main() -> None:
    kinds = list(steps_by_kind(8))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="+", default=kinds, choices=kinds)
    parser.add_argument("--heal", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    add_json_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), flush=True)
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    shedding = Shedding(options.model, folder, options.heal, options.seed)
    program, ctx = shedding.original()
    store = RowStore(folder / "rows.json", {"model": options.model, "heal": options.heal, "seed": options.seed})
    if not store.rows:
        store.add({"step": "original"} | quality(program.model, ctx))
    steps = steps_by_kind(len(skeleton_of(program).scans))
    for step in (step for kind in options.kinds for step in steps[kind]):
        if all(row["step"] != step for row in store.rows):
            store.add({"step": step} | shedding.measured_row(step, program))
            print(*table_lines([store.rows[0], store.rows[-1]])[-1], f"{store.rows[-1]['seconds']:.0f} s", flush=True)
    columns, *lines = table_lines(store.rows)
    print(markdown([columns, *lines]))
    write_table(options.json, columns, lines)


if __name__ == "__main__":
    main()

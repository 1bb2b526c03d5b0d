"""Print perplexity and latency against parts removed, for each kind of part, on the zoo's state-space models.

    python -m bench.shed [--models tiny-mamba2 tiny-hybrid] [--heal STEPS]

Searches are racing ones, scored on rows of calib.txt; perplexity is measured on rows of heldout.txt, which nothing
learns from or decides by. The cost of a search is told in forwards of layers, and as a share of those that whole
models for every candidate would take. Latency is the median of a prefill of 256 tokens and of a decoded token, batch 1,
one thread, scans on effc's kernels as `effc.load` runs them, original and result taking turns step by step. `--heal`
trains all weights of each result for some steps on calib.txt, half of the loss by the original's predictions. A second
table reads each kind's points, joined by lines, at equal latency and at equal size. Seed 0.
"""

import argparse
import itertools
import math
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from effc.compiler.driver.pipeline import Build

ROOT = Path(__file__).parents[1]
TEXTS = ROOT / "recipes/zoo/tiny-llama"
SCORED = "score: perplexity(score)"
STEPS = {
    "scans": [f"shed.ssm(remove: {n}, {SCORED})" for n in (1, 2, 3, 5)],
    "blocks": [f"shed.blocks(remove: {n}, {SCORED})" for n in (1, 2, 3, 5)],
    "heads": [f"shed.heads(keep: {k}% of heads, {SCORED})" for k in (90, 75, 50)],
    "states": [f"shed.state(keep: {k}% of states, {SCORED})" for k in (75, 50, 25)],
    "all kinds": [
        f"shed.multi(remove: {what}, {SCORED})"
        for what in ("5% of params", "10% of params", "20% of params", "20% of flops", "8")
    ],
}
SHARES = {"prefill": (0.9, 0.75, 0.6, 0.5), "params": (0.95, 0.9, 0.8, 0.7)}
RECIPE = """effspec 1
model base    = zoo("{model}")
data  calib   = text("{texts}/calib.txt", length: 128)
data  score   = text("{texts}/calib.txt", samples: 8, length: 128, seed: 7)
data  heldout = text("{texts}/heldout.txt", samples: 48, length: 256, seed: 7)
pipeline lean(base) {{
  cut = {step}
{heal}}}
emit lean {{ hf("lean", form: compact) }}
"""


@dataclass(frozen=True)
class Point:
    kind: str
    step: str
    params: float  # shares of the original's
    prefill: float
    decode: float
    perplexity: float
    healed: float | None
    seconds: float
    forwards: float  # of layers that the search ran, and that whole models would have taken
    naive: float


def build_of(folder: Path, model: str, step: str, heal: int) -> "Build":
    from effc.compiler.core.cache import Cache
    from effc.compiler.driver import api
    from effc.compiler.driver.pipeline import Build

    recipe = folder / "shed.effspec"
    fit = (
        f"  fit = tune.heal(data: calib, steps: {heal}, batch: 8, method: full, lr: 2e-4, distill: 50%)\n"
        if heal
        else ""
    )
    recipe.write_text(RECIPE.format(model=model, texts=TEXTS, step=step, heal=fit))
    session = api.open_session(recipe, cache_dir=folder / "cache", threads=1, seed=0)
    (plan,) = api.plan_all_pipelines(session)
    return Build(plan, session.context(plan.recipe, plan.pipeline), Cache(session.settings.cache_dir))


def perplexity(model, ctx) -> float:
    from effc.compiler.models.rows.forward import total_nll
    from effc.dsl.checker.values import DataRef

    nats, tokens = total_nll(model, ctx.rows(DataRef("heldout")))
    return math.exp(nats / tokens)


def time_in_turns(metric, models) -> list[float]:
    """What a timed metric says of several models whose steps take turns, the order changing every round."""
    from effc.compiler.evaluation.timing import WARMUP, timing_conditions

    clocks = [metric.clock(model) for model in models]
    taken: list[list[float]] = [[] for _ in models]
    with timing_conditions(models[0]), timing_conditions(models[1]):
        for turn in range(WARMUP + clocks[0].count):
            for i in (0, 1)[:: 1 if turn % 2 == 0 else -1]:
                taken[i].append(clocks[i].step())
    return [clock.value(seconds[WARMUP:]) for clock, seconds in zip(clocks, taken, strict=True)]


def time_ratio(metric, original, result, times: int = 5) -> float:
    """The median of some races, each of medians: where memory comes to lie, and who else runs, sways a single one."""
    ratios = []
    for _ in range(times):
        before, after = time_in_turns(metric, (original, result))
        ratios.append(after / before)
    return statistics.median(ratios)


def measure_point(folder: Path, model: str, kind: str, step: str, heal: int, original) -> Point:
    from effc.compiler.core.events import Recorded
    from effc.compiler.ir.layers.fast_mixers import use_mixer_kernels
    from effc.dsl.checker.values import MetricRef

    build = build_of(folder, model, step, heal)
    told: dict[str, float] = {}
    recorded = lambda event: told.update({event.name: event.value} if isinstance(event, Recorded) else {})  # noqa: E731
    build.ctx = replace(build.ctx, settings=replace(build.ctx.settings, on_event=recorded))
    started = time.perf_counter()
    build.run_step_unless_cached(build.plan.stages[0])
    seconds = time.perf_counter() - started
    program = build.load_outcome(build.plan.stages[0].key).program
    use_mixer_kernels(program.model)
    size = sum(p.numel() for p in program.model.parameters()) / sum(p.numel() for p in original.parameters())
    prefill, decode = (
        time_ratio(build.ctx.metric(ref), original, program.model)
        for ref in (MetricRef("prefill.p50", (("prompt", 256),)), MetricRef("decode.p50"))
    )
    shed = perplexity(program.model, build.ctx)
    healed = None
    if heal:
        build.run_step_unless_cached(build.plan.stages[1])
        healed = perplexity(build.load_outcome(build.plan.stages[1].key).program.model, build.ctx)
    return Point(
        kind,
        step,
        size,
        prefill,
        decode,
        shed,
        healed,
        seconds,
        told.get("layer forwards", math.nan),
        told.get("layer forwards, were every candidate scored by the whole model", math.nan),
    )


def text_plot(points: list[Point], base: float, width: int = 60, height: int = 14) -> str:
    """Perplexity over prefill time, a letter per kind; the original is `*` at 100%."""
    marks = dict(zip(STEPS, "SBHTA", strict=True))
    low = min(0.95, *(p.prefill for p in points)) if points else 0.5
    top = min(max(p.perplexity for p in points), 8 * base)
    grid = [[" "] * (width + 1) for _ in range(height + 1)]

    def put(x: float, y: float, mark: str) -> None:
        column = round((min(x, 1.0) - low) / (1.0 - low) * width)
        row = round(math.log(min(y, top) / base) / math.log(top / base) * height) if top > base else 0
        grid[height - min(max(row, 0), height)][max(column, 0)] = mark

    put(1.0, base, "*")
    for p in points:
        put(p.prefill, p.perplexity, marks[p.kind])
    lines = [f"  {base * (top / base) ** ((height - i) / height):8.1f} |" + "".join(row) for i, row in enumerate(grid)]
    legend = "  ".join(f"{mark} {kind}" for kind, mark in marks.items() if any(p.kind == kind for p in points))
    return "\n".join(
        [
            *lines,
            f"  {'':8} +{'-' * width}",
            f"  {'':9}{low:.0%}{'of the prefill time':^{width - 8}}100%",
            f"  {legend}",
        ]
    )


def perplexities_at_shares(points: list[Point], base: float, axis: str, shares: tuple[float, ...]) -> str:
    """Perplexity after shedding and after healing, of each kind where it reaches a share of the original's `axis`."""
    rows = [f"  perplexity at equal {axis:<12}" + "".join(f"{share:>18.0%}" for share in shares)]
    for kind in STEPS:
        own = [p for p in points if p.kind == kind]
        if own:
            told = [_interpolated(own, base, axis, share) for share in shares]
            rows.append(f"  {kind:<32}" + "".join(f"{cell:>18}" for cell in told))
    return "\n".join(rows)


def _interpolated(points: list[Point], base: float, axis: str, removed_share: float) -> str:
    known = sorted(
        [
            (1.0, math.log(base), math.log(base)),
            *((getattr(p, axis), math.log(p.perplexity), math.log(p.healed or math.nan)) for p in points),
        ]
    )
    for low, high in itertools.pairwise(known):
        if low[0] <= removed_share <= high[0] and low[0] < high[0]:
            part = (removed_share - low[0]) / (high[0] - low[0])
            shed, healed = (math.exp(a + part * (b - a)) for a, b in zip(low[1:], high[1:], strict=True))
            return f"{shed:.1f}" if math.isnan(healed) else f"{shed:.1f} -> {healed:.1f}"
    return "-"


def main() -> None:
    from effc.compiler.core.fingerprint import machine_facts
    from effc.compiler.ir.layers.fast_mixers import use_mixer_kernels

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["tiny-mamba2", "tiny-hybrid"])
    parser.add_argument("--kinds", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--heal", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()))
    line = "  {:<48}{:>8}{:>9}{:>8}{:>12}{:>9}{:>7}{:>10}{:>9}"
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            build = build_of(Path(folder), model, STEPS["scans"][0], 0)
            original = build.load_outcome(build.plan.identity).program.model
            use_mixer_kernels(original)
            base, points = perplexity(original, build.ctx), []
            print(f"\n{model}: held-out perplexity {base:.2f}; shares of the original")
            print(
                line.format("step", "params", "prefill", "decode", "perplexity", "healed", "s", "forwards", "of naive")
            )
            for kind in args.kinds:
                for step in STEPS[kind]:
                    p = measure_point(Path(folder), model, kind, step, args.heal, original)
                    points.append(p)
                    print(
                        line.format(
                            step.replace(f", {SCORED}", ""),
                            f"{p.params:.1%}",
                            f"{p.prefill:.0%}",
                            f"{p.decode:.0%}",
                            f"{p.perplexity:.2f}",
                            f"{p.healed:.2f}" if p.healed else "",
                            f"{p.seconds:.0f}",
                            f"{p.forwards:.0f}",
                            f"{p.forwards / p.naive:.0%}",
                        ),
                        flush=True,
                    )
            print(text_plot(points, base))
            for axis, shares in SHARES.items():
                print(perplexities_at_shares(points, base, axis, shares))


if __name__ == "__main__":
    main()

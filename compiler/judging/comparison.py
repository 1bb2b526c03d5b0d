"""The emitted thing against the original: every bound's metric, and size, in one run."""

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...dsl.diagnostics import Reject
from ...dsl.show import show
from ...dsl.values import MetricRef
from ..artifacts.load import FORMS, load
from ..artifacts.manifest import Measure
from ..measuring.timing import interleaved, no_cache
from ..planning import keys
from ..store.cache import Cache
from ..words.context import Context
from .gate import Known, Outcome, measure_bounds, metric_label

if TYPE_CHECKING:
    from ..planning.plan import Plan

ALWAYS = ("params", "bytes")
SPEED = "decode.p50"


@dataclass(frozen=True)
class Comparison:
    outcomes: tuple[Outcome, ...]
    measures: tuple[Measure, ...]
    run: dict[str, Any] = field(default_factory=dict)


def reopened(folder: Path, ctx: Context) -> Any:
    """The model that lies in a folder; its weights are mapped from disk, not held."""
    return load(next(folder / form for form in FORMS if (folder / form).is_dir()), check="size",
                device=ctx.settings.device)


def compare(model: Any, plan: "Plan", cache: Cache, ctx: Context) -> Comparison:
    """Measure a model beside the original, and judge every bound of the plan's pipeline on it."""
    started = time.time()
    original = ctx.origin.load().eval()
    known = remembered(plan, cache, ctx)
    before = dict(known)
    turns = clocked(original, model, plan, ctx)
    known |= {(plan.pipeline.model, metric): pair[0] for metric, pair in turns.items()}
    outcomes = measure_bounds(plan.pipeline, model, ctx, known, {metric: pair[1] for metric, pair in turns.items()})
    remember(known, before, plan, cache, ctx)
    pairs = {o.bound.metric: (o.original, o.value) for o in outcomes if o.value is not None}
    for metric in (*map(MetricRef, ALWAYS), *unjudged_scores(plan, ctx)):
        if metric not in pairs:
            ours = ctx.metric(metric)
            pairs[metric] = (ours.measure(original, ctx), ours.measure(model, ctx))
    pairs |= {metric: pair for metric, pair in turns.items() if metric not in pairs}
    run = {"created": datetime.now(UTC).isoformat(timespec="seconds"),
           "seconds": {"measure": round(time.time() - started, 2)}}
    named = {bound.metric: metric_label(bound) for bound in reversed(plan.pipeline.expects)}
    measures = (measured(m, named.get(m) or show(m), *pairs[m], ctx) for m in in_order(pairs))
    return Comparison(tuple(outcomes), tuple(measures), run)


def clocked(original: Any, model: Any, plan: "Plan", ctx: Context) -> dict[MetricRef, tuple[float, float]]:
    """Times of both models, taking turns: those that a bound names, and one that every table has."""
    asked = [b.metric for b in plan.pipeline.expects if b.profile is None and ctx.metric(b.metric).timed]
    decodes = plan.skeleton.facts.get("causal_lm") and hasattr(model, "generate")      # a plain program doesn't
    more = [MetricRef(SPEED)] if decodes else []
    found = {}
    for metric in dict.fromkeys([*asked, *more]):
        try:
            turns = interleaved({"original": original, "compiled": model}, ctx.metric(metric), rounds=3)
        except Reject as refused:
            if metric in asked or any(d.fault is not no_cache for d in refused.diagnostics):
                raise
            continue                     # nobody asked how fast a model decodes that doesn't
        found[metric] = (turns.values["original"], turns.values["original"] * turns.ratio)
    return found


def unjudged_scores(plan: "Plan", ctx: Context) -> list[MetricRef]:
    """What the steps were scored by, where no bound says how good the result must be."""
    if any(bound.metric.args for bound in plan.pipeline.expects):
        return []
    found = [call for step in plan.pipeline.steps for call in step.call.args.values() if isinstance(call, MetricRef)]
    return [metric for metric in dict.fromkeys(found) if not ctx.metric(metric).timed]


def in_order(pairs: dict[MetricRef, Any]) -> list[MetricRef]:
    """Sizes first, then quality, then speed."""
    rank = {name: i for i, name in enumerate(ALWAYS)}
    return sorted(pairs, key=lambda m: rank.get(m.name, 2 + m.name.startswith(("decode", "prefill", "throughput"))))


def measured(metric: MetricRef, name: str, original: float | None, compiled: float, ctx: Context) -> Measure:
    """A row of the table; `name` is what the recipe calls the metric, so that bounds find their row."""
    word = ctx.metric(metric)
    return Measure(name, word.unit, original, compiled, compiled / original if original else None, word.better)


def remembered(plan: "Plan", cache: Cache, ctx: Context) -> Known:
    """Values of the original that an earlier compile measured; times are measured anew every time."""
    found = {}
    for bound in plan.pipeline.expects:
        if bound.baseline == plan.pipeline.model and bound.profile is None and not ctx.metric(bound.metric).timed:
            value = cache.value(keys.value_parts(bound.metric, ctx.origin.identity, ctx))
            if value is not None:
                found[bound.baseline, bound.metric] = value
    return found


def remember(known: Known, before: Known, plan: "Plan", cache: Cache, ctx: Context) -> None:
    for (name, metric), value in known.items():
        plain = name == plan.pipeline.model and "on" not in dict(metric.args)
        if plain and (name, metric) not in before and not ctx.metric(metric).timed:
            cache.keep(keys.value_parts(metric, ctx.origin.identity, ctx), value)

"""The emitted thing against the original: every bound's metric, and size, in one run."""

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dsl.show import show
from ..dsl.values import MetricRef
from . import keys
from .cache import Cache
from .context import Context
from .gate import Known, Outcome, measure_bounds
from .load import FORMS, load
from .manifest import Measure

if TYPE_CHECKING:
    from .plan import Plan

SIZES = ("params", "bytes")


@dataclass(frozen=True)
class Comparison:
    outcomes: tuple[Outcome, ...]
    measures: tuple[Measure, ...]
    run: dict[str, Any] = field(default_factory=dict)


def compare(folder: Path, plan: "Plan", cache: Cache, ctx: Context) -> Comparison:
    """Measure what lies in a folder. Weights of both models are mapped from disk, not held."""
    started = time.time()
    model = load(next(folder / form for form in FORMS if (folder / form).is_dir()), check="size")
    known = remembered(plan, cache, ctx)
    before = dict(known)
    outcomes = measure_bounds(plan.pipeline, model, ctx, known)
    remember(known, before, plan, cache, ctx)
    measures = {show(o.bound.metric): measure(o, ctx) for o in outcomes if o.value is not None}
    sizes = {name: size(name, model, plan, ctx) for name in SIZES if name not in measures}
    run = {"created": datetime.now(UTC).isoformat(timespec="seconds"),
           "seconds": {"measure": round(time.time() - started, 2)}}
    return Comparison(tuple(outcomes), (*sizes.values(), *measures.values()), run)


def measure(outcome: Outcome, ctx: Context) -> Measure:
    metric = ctx.metric(outcome.bound.metric)
    ratio = outcome.value / outcome.original if outcome.original else None
    return Measure(show(outcome.bound.metric), metric.unit, outcome.original, outcome.value, ratio,
                   metric.better)


def size(name: str, model: Any, plan: "Plan", ctx: Context) -> Measure:
    """Parameters or bytes of weights, of both models."""
    metric = ctx.metric(MetricRef(name))
    original, compiled = metric.measure(ctx.origin.load(), ctx), metric.measure(model, ctx)
    return Measure(name, metric.unit, original, compiled, compiled / original, metric.better)


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

"""The emitted thing against the original: every bound's metric, and size, in one run."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ....dsl.checker.recipe import Bound
from ....dsl.checker.value_text import value_text
from ....dsl.checker.values import MetricRef
from ....dsl.syntax.diagnostics import Reject
from ...analysis.planning import cost, keys
from ...artifacts.manifest import Measure
from ...core.cache import Cache
from ...evaluation.timing import WARMUP, InterleavedTimes, measure_interleaved, measure_single
from ...models.rows.decoding import no_cache
from ...plugin.clock import reason_not_timed
from ...plugin.context import Context
from ...runtimes.model import DecoderModel
from .gate import BoundVerdict, Known, measure_and_judge_bounds, metric_label
from .scores import Score, measure_score
from .timed_bounds import SECONDS, interval_decides, undecided_reason

if TYPE_CHECKING:
    from ...analysis.planning.plan import Plan

ALWAYS = ("params", "bytes")
SPEED = "decode.p50"
ROUNDS = 100  # of timings that are kept


@dataclass(frozen=True)
class Comparison:
    outcomes: tuple[BoundVerdict, ...]
    measures: tuple[Measure, ...]
    run: dict[str, Any] = field(default_factory=dict)
    ratios: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # of each round, of what a clock measured


def measure_beside_original(
    model: Any,
    plan: "Plan",
    cache: Cache,
    ctx: Context,
    on_original: Callable[[Any], None] = lambda original: None,
    extra_metrics: Sequence[MetricRef] | None = None,
) -> Comparison:
    """Measure a model beside the original, and judge every bound of the plan's pipeline on it.

    on_original  looks at the original, too
    extra_metrics   what else is measured; by default the scores of steps that no bound limits
    """
    started = time.time()
    original = ctx.origin.load().eval()
    on_original(original)
    known = cached_original_values(plan, cache, ctx)
    cached = dict(known)
    extra_metrics = metrics_without_bounds(plan, ctx) if extra_metrics is None else extra_metrics
    clocked = [metric for metric in extra_metrics if ctx.metric(metric).timed]
    timings, untimed = time_interleaved(original, model, plan, ctx, clocked)
    pairs_timed = {metric: (t.values["original"], t.values["original"] * t.ratio) for metric, t in timings.items()}
    known |= {(plan.pipeline.model, metric): Score(pair[0]) for metric, pair in pairs_timed.items()}
    outcomes = measure_and_judge_bounds(
        plan.pipeline, model, ctx, known, {metric: pair[1] for metric, pair in pairs_timed.items()}
    )
    outcomes = [mark_undecided(o, timings, plan.pipeline.model) for o in outcomes]
    store_original_values(known, cached, plan, cache, ctx)
    pairs = original_and_result_values(outcomes, pairs_timed)
    intervals = result_intervals(outcomes)
    for metric in (*map(MetricRef, ALWAYS), *extra_metrics):
        if metric not in pairs and metric not in clocked:
            before, after = (measure_score(ctx.metric(metric), m, ctx) for m in (original, model))
            pairs[metric], intervals[metric] = (before.value, after.value), after.interval(before)
    named = {bound.metric: metric_label(bound) for bound in reversed(plan.pipeline.expects)}
    spread = {metric: t.spread for metric, t in timings.items() if len(t.rounds) > 1}
    measures = (
        replace(
            measure_row(m, named.get(m) or value_text(m), *pairs[m], ctx),
            spread=spread.get(m),
            interval=relative_interval(intervals.get(m), pairs[m][0]),
        )
        for m in metrics_in_table_order(pairs)
    )
    blank = (_untimed_row(m, named.get(m) or value_text(m), reason, ctx) for m, reason in untimed.items())
    ratios = {named.get(m) or value_text(m): tuple(t.ratios) for m, t in timings.items()}
    run = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": {"measure": round(time.time() - started, 2)},
        "timings": {named.get(m) or value_text(m): round_times_json(t, ctx.metric(m).unit) for m, t in timings.items()},
    }
    return Comparison(tuple(outcomes), (*measures, *blank), run, ratios)


def _untimed_row(metric: MetricRef, metric_text: str, reason: str, ctx: Context) -> Measure:
    word = ctx.metric(metric)
    return Measure(metric_text, word.unit, None, None, better=word.better, untimed=reason)


def original_and_result_values(
    verdicts: Sequence[BoundVerdict], timed: Mapping[MetricRef, tuple[float, float]]
) -> dict[MetricRef, tuple[float | None, float]]:
    """Values of each metric for the original and for the result, as its bounds were judged.

    Of several bounds on one metric not all name the original. Where none does, a clock that took turns knows it,
    unless the bound was judged with a profile's threads.
    """
    pairs: dict[MetricRef, tuple[float | None, float]] = {}
    for o in sorted(verdicts, key=lambda o: o.bound.confidence is not None):  # those that read all rows first
        if o.value is not None and pairs.get(o.bound.metric, (None,))[0] is None:
            pairs[o.bound.metric] = (o.original, o.value)
    profiled = {o.bound.metric for o in verdicts if o.bound.profile}
    unknown = {m for m in timed if pairs.get(m, (None,))[0] is None and not (m in pairs and m in profiled)}
    return {**pairs, **{m: timed[m] for m in unknown}}


def result_intervals(verdicts: Sequence[BoundVerdict]) -> dict[MetricRef, tuple[float, float] | None]:
    """Intervals of metrics over rows, by the bounds whose values `original_and_result_values` takes."""
    first_wins = sorted(verdicts, key=lambda o: (o.original is None, o.bound.confidence is not None))
    return {o.bound.metric: o.interval for o in reversed(first_wins) if o.value is not None}


def relative_interval(interval: tuple[float, float] | None, original: float | None) -> tuple[float, float] | None:
    """Interval of a ratio to the original, where there is one."""
    return (interval[0] / original, interval[1] / original) if interval and original else interval


def round_times_json(timings: InterleavedTimes, unit: str) -> dict[str, Any]:
    """Measurements of each round, to show their spread; of many rounds the first ones."""
    rounds = timings.rounds[:ROUNDS]
    return {"unit": unit} | {name: [float(f"{r[name]:.5g}") for r in rounds] for name in timings.values}


def mark_undecided(
    verdict: BoundVerdict, timings: Mapping[MetricRef, InterleavedTimes], model_name: str
) -> BoundVerdict:
    """The verdict, marked undecided where it was timed in turns that don't decide it."""
    bound = verdict.bound
    if bound.metric not in timings or bound.profile or bound.baseline not in (None, model_name):
        return verdict
    timing = timings[bound.metric]
    reason = undecided_reason(bound, timing, timing.values["original"], verdict.unit)
    return replace(verdict, passed=False, undecided=reason) if reason else verdict


def time_interleaved(
    original: Any, model: Any, plan: "Plan", ctx: Context, timed_metrics: Sequence[MetricRef] = ()
) -> tuple[dict[MetricRef, InterleavedTimes], dict[MetricRef, str]]:
    """Times of both models, taking turns: those that a bound names, `timed_metrics`, and one that every table has;
    and why others were not taken.

    The former are timed until they decide their bounds, or for SECONDS; of the latter a third of the steps a round
    must do, and one round where three would take long: nobody asked for it, and a step of a large model takes seconds.
    Of what is the original itself, written again, it says nothing.
    """
    bounded = [b.metric for b in plan.pipeline.expects if b.profile is None and ctx.metric(b.metric).timed]
    decodes = plan.skeleton.facts.get("causal_lm") and hasattr(model, "generate")  # a plain program doesn't
    itself = not plan.pipeline.steps and type(model) is type(original)
    times_decoding = any(metric.name == SPEED for metric in (*bounded, *timed_metrics))
    usual = (
        [default_speed_metric(_max_tokens_of_both_models(model, ctx))]
        if decodes and not (itself or times_decoding)
        else []
    )
    result, untimed = {}, {}
    for metric in dict.fromkeys([*bounded, *timed_metrics, *usual]):
        try:
            bounds = [
                b
                for b in plan.pipeline.expects
                if b.metric == metric and b.profile is None and b.baseline in (None, plan.pipeline.model)
            ]
            unit = ctx.metric(metric).unit

            def enough(timing: InterleavedTimes, bounds: Sequence[Bound] = bounds, unit: str = unit) -> bool:
                return all(interval_decides(b, timing, timing.values["original"], unit) for b in bounds)

            timing = measure_interleaved(
                {"original": original, "compiled": model},
                ctx.metric(metric),
                rounds=cost.ROUNDS,
                is_decided=enough,
                min_seconds=SECONDS,
                calls_per_round=1 if metric in bounded else cost.ROUNDS,
                max_seconds=math.inf if metric in bounded else cost.UNASKED,
            )
        except Reject as rejection:
            if reason := reason_not_timed(rejection):
                untimed[metric] = reason
                continue
            if metric in bounded or not _does_not_decode(original, ctx.metric(metric)):
                raise
            continue  # nobody asked how fast a model decodes that doesn't
        result[metric] = timing
    return result, untimed


def _does_not_decode(original: Any, metric: Any) -> bool:
    """Whether the original by itself has no decode step; what breaks in the compiled model alone is no such case."""
    try:
        measure_single(metric.clock(original), original)
    except Reject as rejection:
        return all(d.fault is no_cache for d in rejection.diagnostics)
    return False


def _max_tokens_of_both_models(model: Any, ctx: Context) -> int | None:
    """Tokens that both models can continue; None where nothing limits them."""
    limits = (ctx.origin.positions, model.plan["context"] if isinstance(model, DecoderModel) else None)
    return min((limit for limit in limits if limit is not None), default=None)


def default_speed_metric(max_positions: int | None) -> MetricRef:
    """Default metric of decoding speed for tables: by the metric's own prompt, or by one that fits its positions."""
    prompt, steps = 128, 32
    if max_positions is None or max_positions >= prompt + steps + WARMUP:
        return MetricRef(SPEED)
    steps = min(steps, max(1, max_positions // 4))
    return MetricRef(SPEED, (("prompt", max(1, max_positions - steps - WARMUP)), ("steps", steps)))


def metrics_without_bounds(plan: "Plan", ctx: Context) -> list[MetricRef]:
    """Scores of the steps for which no bound states how good the result must be."""
    if any(bound.metric.args for bound in plan.pipeline.expects):
        return []
    scores = [call for step in plan.pipeline.steps for call in step.call.args.values() if isinstance(call, MetricRef)]
    return [metric for metric in dict.fromkeys(scores) if not ctx.metric(metric).timed]


def metrics_in_table_order(values_by_metric: dict[MetricRef, Any]) -> list[MetricRef]:
    """Sizes first, then quality, then speed."""
    rank = {name: i for i, name in enumerate(ALWAYS)}
    return sorted(
        values_by_metric, key=lambda m: rank.get(m.name, 2 + m.name.startswith(("decode", "prefill", "throughput")))
    )


def measure_row(metric: MetricRef, metric_text: str, original: float | None, compiled: float, ctx: Context) -> Measure:
    """A row of the table; `metric_text` is what the recipe calls the metric, so that bounds find their row."""
    word = ctx.metric(metric)
    return Measure(metric_text, word.unit, original, compiled, compiled / original if original else None, word.better)


def cached_original_values(plan: "Plan", cache: Cache, ctx: Context) -> Known:
    """Values of the original that an earlier compile measured; times are measured anew every time."""
    result = {}
    for bound in plan.pipeline.expects:
        if bound.baseline == plan.pipeline.model and bound.profile is None and not ctx.metric(bound.metric).timed:
            value = cache.read_value(keys.metric_value_key_parts(bound.metric, ctx.origin.identity, ctx))
            score = None if value is None else Score.from_json(value, ctx.metric(bound.metric).rowwise)
            if score is not None:
                result[bound.baseline, bound.metric] = score
    return result


def store_original_values(scores: Known, cached_scores: Known, plan: "Plan", cache: Cache, ctx: Context) -> None:
    ctx.origin.refuse_changed_files()
    for (name, metric), score in scores.items():
        plain = name == plan.pipeline.model and "on" not in dict(metric.args)
        if plain and (name, metric) not in cached_scores and not ctx.metric(metric).timed:
            cache.store_value(keys.metric_value_key_parts(metric, ctx.origin.identity, ctx), score.to_json())

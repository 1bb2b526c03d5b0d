"""The gate: what a pipeline's `expect` block demands, measured and judged.

`judge_bound` is pure. `measure_and_judge_bounds` measures each metric once on the result and once on each named
baseline; latency bounds therefore compare two numbers of one process on one machine.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ....dsl.checker.recipe import Bound, Pipeline
from ....dsl.checker.value_text import bound_text, value_text
from ....dsl.checker.values import Bytes, Duration, MetricRef, Range, Ratio
from ....dsl.syntax.diagnostics import Diagnostic, Fault, Reject
from ...analysis.planning.machine_profile import missing_isa_reason, torch_threads_of_profile
from ...core.error_location import diagnostics_located_at
from ...core.quantity import BYTES_PER, SECONDS_PER, measurement_text, range_text
from ...plugin.clock import reason_not_timed
from ..models import resolve_recipe_model
from .reading import read_until_decided
from .scores import Score, measure_score

if TYPE_CHECKING:
    import torch

    from ...plugin.context import Context

expectation_missed = Fault(
    "expectation-missed",
    "A measured value lies outside the bound that an `expect` block sets.\n\n"
    "The artifact exists and reloads, but it is not as good, as small or as fast as the recipe demands. "
    "Loosen the bound, or ask less of the passes: keep more channels, remove fewer blocks, tune longer.",
    exit="gate",
)
bound_skipped = Fault(
    "bound-skipped",
    "A bound holds for a machine profile that this machine does not match, or for what only a run of the artifact "
    "gives, so it was not measured here.\n\n"
    "Run `effc test` on the machine that the profile describes, or after `effc run`.",
    severity="warning",
)

bound_uncertain = Fault(
    "bound-uncertain",
    "A bound on quality holds for the rows that were measured, which are too few to say so of others like them.\n\n"
    "The value on these rows counts, and the interval says where that of other rows lies 95 times in 100. More rows "
    "make it narrower; `with 95% confidence` behind the bound asks for as many as decide it.",
    severity="warning",
)
bound_undecided = Fault(
    "bound-undecided",
    "A bound could not be decided: what was measured lies too close to its limit, or swings too much.\n\n"
    "Of a timed one the two models took turns, step by step, until the confidence interval of the median lay on one "
    "side of the limit or a minute had passed. Of one `with 95% confidence` all rows of its data were read. The exit "
    "code is that of a missed bound; `--undecided pass` lets it through. `effc explain undecided` says what helps.",
    exit="gate",
)
bound_left_open = Fault(
    "bound-left-open", "A bound could not be decided, and `--undecided pass` lets it through.", severity="warning"
)

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": lambda a, b: a <= b,
    "<": lambda a, b: a < b,
    ">=": lambda a, b: a >= b,
    ">": lambda a, b: a > b,
    "==": lambda a, b: a == b or math.isclose(a, b, rel_tol=1e-9),
}  # 1e-9: the limit is a product
_VERDICT_WORDS = {"<=": "above", "<": "not below", ">=": "below", ">": "not above", "==": "not", "in": "outside"}


Known = dict[tuple[str, MetricRef], Score]  # of baselines by (model name, metric)


@dataclass(frozen=True)
class BoundVerdict:
    """One bound, judged. `low` and `high` are its limits in the metric's unit, None where open.

    value      of the result, in `unit`; None where the bound was skipped
    original   the baseline's value, None where the bound names none
    skipped    why it was not measured, "" where it was
    undecided  why timings don't decide it, "" where they do
    rows       that the value is the mean of: `60 questions`; "" where it is not of rows
    interval   95 % interval of the value over such rows; of a bound with a baseline by differences to it, row by row
    where      the point of a front that it is of, or the artifact that it was judged on again
    """

    bound: Bound
    value: float | None
    original: float | None = None
    unit: str = ""
    passed: bool = True
    low: float | None = None
    high: float | None = None
    skipped: str = ""
    where: str = ""
    undecided: str = ""
    rows: str = ""
    interval: tuple[float, float] | None = None

    @property
    def limit(self) -> str:
        """The resolved limit as text: `21.8`, `18 .. 22`."""
        limits = [measurement_text(e, self.unit) for e in dict.fromkeys((self.low, self.high)) if e is not None]
        return " .. ".join(limits)

    @property
    def state(self) -> str:
        if self.skipped or self.undecided:
            return "skipped" if self.skipped else "undecided"
        return "ok" if self.passed else "missed"

    @property
    def uncertainty_reason(self) -> str:
        """Why rows like these leave open what was judged by its value, "" where they don't."""
        if not self.rows or self.bound.confidence is not None or self.state not in ("ok", "missed"):
            return ""
        if self.interval is None:
            return f"not certain: {self.rows} are too few to say"
        if is_decided(self.bound, self.original, self.interval, self.unit):
            return ""
        interval, limit = self.relative_interval
        return f"not certain: {self.rows} leave {interval}, the limit is {limit}"

    @property
    def decided_by_text(self) -> str:
        """Rows that decided a bound with confidence: `decided by 48 of 512 rows`; "" of others."""
        sure = self.bound.confidence is not None and self.state in ("ok", "missed")
        return f"decided by {self.rows}" if sure else ""

    @property
    def relative_interval(self) -> tuple[str, str]:
        """The interval and the limit, both as ratios to the original where the bound names one."""
        assert self.interval is not None, "nothing is known of other rows"
        limit = f"{value_text(self.bound.limit)} * {self.bound.baseline}" if self.original else self.limit
        return range_text(*(end / (self.original or 1.0) for end in self.interval)), limit

    def to_json(self) -> dict:
        def finite(x: float | None) -> float | str | None:
            return x if x is None or math.isfinite(x) else str(x)

        return {
            "bound": bound_text(self.bound),
            "metric": metric_label(self.bound),
            "state": self.state,
            "value": finite(self.value),
            "original": finite(self.original),
            "unit": self.unit,
            "low": finite(self.low),
            "high": finite(self.high),
            "skipped": self.skipped,
            "undecided": self.undecided,
            "rows": self.rows,
            "interval": self.interval and [finite(end) for end in self.interval],
            "uncertain": self.uncertainty_reason,
        }


def judge_bound(bound: Bound, original: float | None, value: float, unit: str = "") -> BoundVerdict:
    """Whether a value keeps a bound. `original` is the baseline's value where the bound names one.

    A value or limit that is not a number keeps no bound.
    """
    assert (bound.baseline is None) == (original is None), f"{bound.baseline} against {original}"
    factor = 1.0 if original is None else original
    limits = (bound.limit.low, bound.limit.high) if isinstance(bound.limit, Range) else (bound.limit,) * 2
    low, high = (limit_in_unit(end, unit) * factor for end in limits)
    if bound.op == "in":
        low, high = min(low, high), max(low, high)  # a negative baseline turns the range round
        passed = low <= value <= high
        return BoundVerdict(bound, value, original, unit, passed, low, high)
    passed = _COMPARE[bound.op](value, low)
    return BoundVerdict(
        bound,
        value,
        original,
        unit,
        passed,
        None if bound.op in ("<=", "<") else low,
        None if bound.op in (">=", ">") else high,
    )


def is_decided(bound: Bound, original: float | None, interval: tuple[float, float], unit: str = "") -> bool:
    """Whether both ends of an interval, and so all between them, get the same verdict."""
    low, high = (judge_bound(bound, original, end, unit) for end in interval)
    if bound.op == "in" and low.low is not None and low.high is not None and not low.passed and not high.passed:
        return interval[1] < low.low or interval[0] > low.high
    return low.passed == high.passed


def limit_in_unit(limit: Any, unit: str) -> float:
    """A limit as a number in the metric's unit."""
    match limit:
        case Bytes(value):
            return value / BYTES_PER.get(unit, 1)
        case Duration(value):
            return value / SECONDS_PER.get(unit, 1.0)
        case Ratio(value):
            return value * 100 if unit == "%" else value
    return float(limit)


def measure_and_judge_bounds(
    pipeline: Pipeline,
    model: "torch.nn.Module",
    ctx: "Context",
    baseline_values: "Known | None" = None,
    timed_values: "Mapping[MetricRef, float] | None" = None,
) -> list[BoundVerdict]:
    """Measure and judge every bound of a pipeline on its result, in the order they are written.

    `baseline_values` holds values of baselines by (model name, metric) and is filled with those measured here; pass the
    same one again to measure no baseline twice. A baseline's weights are loaded once and dropped again. `timed_values`
    holds values of the result that were measured already, in turn with a baseline's.
    """
    baseline_values = {} if baseline_values is None else baseline_values
    scores: dict[tuple[MetricRef, str | None], tuple[Score, str]] = {}
    untimed: dict[tuple[MetricRef, str | None], str] = {}
    skipped_bounds = {b: reason for b in pipeline.expects if (reason := missing_isa_reason(b.profile, ctx))}
    judged_bounds = [b for b in pipeline.expects if b not in skipped_bounds]
    readings = {}
    for bound in ctx.each(judged_bounds, "expect", len(judged_bounds)):
        if bound.confidence is not None:
            readings[bound] = _judge_by_rows(bound, model, ctx)
            continue
        key = (bound.metric, bound.profile)
        if key in scores or key in untimed:
            continue
        with torch_threads_of_profile(bound.profile, ctx):
            metric = ctx.metric(bound.metric)
            value = None if bound.profile else (timed_values or {}).get(bound.metric)
            try:
                scores[key] = measure_score(metric, model, ctx) if value is None else Score(value), metric.unit
            except Reject as rejection:
                untimed[key] = reason_not_timed(rejection)
                if not untimed[key]:
                    raise
                continue
        ctx.record(metric_label(bound), scores[key][0].value, scores[key][1])
    _measure_missing_baselines(
        [b for b in judged_bounds if (b.metric, b.profile) in scores and b not in readings], ctx, baseline_values
    )
    outcomes = []
    for bound in pipeline.expects:
        if bound in skipped_bounds:
            outcomes.append(BoundVerdict(bound, None, skipped=skipped_bounds[bound]))
            continue
        if bound in readings:
            outcomes.append(readings[bound])
            continue
        if (bound.metric, bound.profile) in untimed:
            outcomes.append(BoundVerdict(bound, None, passed=False, undecided=untimed[bound.metric, bound.profile]))
            continue
        score, unit = scores[bound.metric, bound.profile]
        original = baseline_values[_baseline_key(bound)] if bound.baseline else None
        outcome = judge_bound(bound, None if original is None else original.value, score.value, unit)
        outcomes.append(replace(outcome, rows=score.row_count_text, interval=score.interval(original)))
    return outcomes


def _judge_by_rows(bound: Bound, model: Any, ctx: "Context") -> BoundVerdict:
    """A bound that a paired sequential test decides; where all rows leave it open it is undecided."""
    metric = ctx.metric(bound.metric)
    origin = baseline_origin(bound.baseline, ctx) if bound.baseline else None
    limit = limit_in_unit(bound.limit, metric.unit)
    with torch_threads_of_profile(bound.profile, ctx):
        reading = read_until_decided(bound, limit, metric, model, origin and origin.load().eval(), ctx)
    if origin:
        origin.refuse_changed_files()
    ctx.record(metric_label(bound), reading.score.value, metric.unit)
    original = None if reading.original is None else reading.original.value
    outcome = replace(
        judge_bound(bound, original, reading.score.value, metric.unit),
        passed=reading.verdict.outcome == "holds",
        rows=reading.row_count_text,
        interval=reading.interval,
    )
    return replace(outcome, undecided=_undecided_reason(outcome)) if reading.verdict.outcome == "undecided" else outcome


def _undecided_reason(verdict: BoundVerdict) -> str:
    """Why rows leave a bound open that they were to decide, as a sentence."""
    assert verdict.bound.confidence is not None, "rows were to decide it"
    if verdict.interval is None:
        return f"{verdict.rows} are too few to say"
    low_high, limit = verdict.relative_interval
    return f"{verdict.rows} leave {low_high} with {100 * verdict.bound.confidence:g} % confidence, the limit is {limit}"


def _baseline_key(bound: Bound) -> tuple[str, MetricRef]:
    """A profile changes the thread count, so a profiled metric is another metric."""
    metric = bound.metric
    if bound.profile:
        metric = replace(metric, args=(*metric.args, ("on", bound.profile)))
    return bound.baseline or "", metric


def _measure_missing_baselines(bounds: Sequence[Bound], ctx: "Context", baseline_values: Known) -> None:
    for name in dict.fromkeys(b.baseline for b in bounds if b.baseline):
        by_key = {_baseline_key(b): b for b in bounds if b.baseline == name}
        missing = {key: b for key, b in by_key.items() if key not in baseline_values}
        if not missing:
            continue
        origin = baseline_origin(name, ctx)
        model = origin.load().eval()
        for key, bound in ctx.each(list(missing.items()), f"expect {name}", len(missing)):
            with torch_threads_of_profile(bound.profile, ctx):
                baseline_values[key] = measure_score(ctx.metric(bound.metric), model, ctx)
        origin.refuse_changed_files()
        del model


def baseline_origin(name: str, ctx: "Context") -> Any:
    """The origin of a model that the recipe declares."""
    call = ctx.recipe.models[name]
    with diagnostics_located_at(call.span):
        origin = resolve_recipe_model(call, ctx.relative_to(call))
    return origin.with_span_and_load_device(call.span, ctx.settings.device)


def unmet_bound_diagnostics(verdicts: Sequence[BoundVerdict], undecided_policy: str = "fail") -> list[Diagnostic]:
    """A diagnostic at the recipe line of every bound that was missed or left open, a warning for every one skipped.

    undecided_policy   "fail", or "pass" for a warning
    """
    diagnostics = []
    for o in verdicts:
        if o.skipped:
            message = f"`{bound_text(o.bound)}` was not measured"
            diagnostics.append(bound_skipped(message, o.bound.span, note=o.skipped))
        elif o.undecided:
            fault = bound_undecided if undecided_policy == "fail" else bound_left_open
            diagnostics.append(
                fault(
                    f"`{bound_text(o.bound)}` is undecided {'by its rows' if o.rows else 'on this machine'}",
                    o.bound.span,
                    note=o.undecided,
                    help=_undecided_remedy(o),
                )
            )
        elif not o.passed:
            diagnostics.append(_missed_bound_diagnostic(o))
        elif o.uncertainty_reason:
            diagnostics.append(
                bound_uncertain(
                    f"`{bound_text(o.bound)}` holds on these {o.rows}{(f' of `{o.where}`' if o.where else '')}",
                    o.bound.span,
                    note=o.uncertainty_reason,
                    help="measure on more rows",
                )
            )
    return diagnostics


def _undecided_remedy(verdict: BoundVerdict) -> str:
    if verdict.rows:
        return "give more rows, or loosen the bound"
    if verdict.value is None:
        return "time it where its runtime is installed, or write no bound on its speed"
    return "measure on a machine at rest, or loosen the bound"


def _missed_bound_diagnostic(verdict: BoundVerdict) -> Diagnostic:
    assert verdict.value is not None, "a skipped bound is no miss"
    name = metric_label(verdict.bound)
    name += f"` of `{verdict.where}" if verdict.where else ""
    measured = measurement_text(verdict.value, verdict.unit)
    message = f"`{name}` is {measured}, {_VERDICT_WORDS[verdict.bound.op]} {verdict.limit}"
    if math.isnan(verdict.value):
        message = f"`{name}` is not a number"
    notes = (
        [f"`{verdict.bound.baseline}` measures {measurement_text(verdict.original, verdict.unit)}"]
        if verdict.original is not None
        else []
    )
    notes += [reason] if (reason := verdict.uncertainty_reason or verdict.decided_by_text) else []
    return expectation_missed(message, verdict.bound.span, note="; ".join(notes))


def metric_label(bound: Bound) -> str:
    """The metric of a bound as it was written."""
    source_text = bound_text(bound).split(f" {bound.op} ", 1)[0] if bound.span else ""
    return source_text or value_text(bound.metric)

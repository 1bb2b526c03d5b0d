"""The gate: what a pipeline's `expect` block demands, measured and judged.

`judge_bound` is pure. `measure_and_judge_bounds` measures each metric once on the result and once on each named
baseline; latency bounds therefore compare two numbers of one process on one machine.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ....dsl.checker.recipe import Bound, Pipeline
from ....dsl.checker.value_text import value_text
from ....dsl.checker.values import Bytes, Duration, MetricRef, Range, Ratio
from ....dsl.syntax.diagnostics import Diagnostic, Fault
from ...analysis.planning.machine_profile import profile_mismatch, with_profile_threads
from ...core.error_location import diagnostics_located_at
from ...core.quantity import BYTES_PER, SECONDS_PER, measurement_text
from ...models.rows.batch_limit import retry_with_smaller_batches_on_oom

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

bound_undecided = Fault(
    "bound-undecided",
    "A timed bound could not be decided on this machine: what was measured lies too close to the limit, or swings too "
    "much.\n\n"
    "The two models took turns, step by step, until the confidence interval of the median lay on one side of the limit "
    "or a minute had passed. It is no yes, so the exit code is that of a gate; `--undecided pass` lets it through.",
    exit="gate",
)
bound_left_open = Fault(
    "bound-left-open",
    "A timed bound could not be decided on this machine, and `--undecided pass` lets it through.",
    severity="warning",
)

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": lambda a, b: a <= b,
    "<": lambda a, b: a < b,
    ">=": lambda a, b: a >= b,
    ">": lambda a, b: a > b,
    "==": lambda a, b: a == b or math.isclose(a, b, rel_tol=1e-9),
}  # 1e-9: the limit is a product
_VERDICT_WORDS = {"<=": "above", "<": "not below", ">=": "below", ">": "not above", "==": "not", "in": "outside"}


Known = dict[tuple[str, MetricRef], float]  # values of baselines by (model name, metric)


@dataclass(frozen=True)
class Outcome:
    """One bound, judged. `low` and `high` are its limits in the metric's unit, None where open.

    value      of the result, in `unit`; None where the bound was skipped
    original   the baseline's value, None where the bound names none
    skipped    why it was not measured, "" where it was
    undecided  why timings don't decide it, "" where they do
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
        }


def judge_bound(bound: Bound, original: float | None, value: float, unit: str = "") -> Outcome:
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
        return Outcome(bound, value, original, unit, passed, low, high)
    passed = _COMPARE[bound.op](value, low)
    return Outcome(
        bound,
        value,
        original,
        unit,
        passed,
        None if bound.op in ("<=", "<") else low,
        None if bound.op in (">=", ">") else high,
    )


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
) -> list[Outcome]:
    """Measure and judge every bound of a pipeline on its result, in the order they are written.

    `baseline_values` holds values of baselines by (model name, metric) and is filled with those measured here; pass the
    same one again to measure no baseline twice. A baseline's weights are loaded once and dropped again. `timed_values`
    holds values of the result that were measured already, in turn with a baseline's.
    """
    baseline_values = {} if baseline_values is None else baseline_values
    values: dict[tuple[MetricRef, str | None], tuple[float, str]] = {}
    skipped_bounds = {b: reason for b in pipeline.expects if (reason := profile_mismatch(b.profile, ctx))}
    judged_bounds = [b for b in pipeline.expects if b not in skipped_bounds]
    for bound in ctx.each(judged_bounds, "expect", len(judged_bounds)):
        key = (bound.metric, bound.profile)
        if key not in values:
            with with_profile_threads(bound.profile, ctx):
                metric = ctx.metric(bound.metric)
                value = None if bound.profile else (timed_values or {}).get(bound.metric)
                value = measure(metric, model, ctx) if value is None else value
                values[key] = (value, metric.unit)
            ctx.record(metric_label(bound), *values[key])
    _measure_missing_baselines(judged_bounds, ctx, baseline_values)
    outcomes = []
    for bound in pipeline.expects:
        if bound in skipped_bounds:
            outcomes.append(Outcome(bound, None, skipped=skipped_bounds[bound]))
            continue
        value, unit = values[bound.metric, bound.profile]
        original = baseline_values[_baseline_key(bound)] if bound.baseline else None
        outcomes.append(judge_bound(bound, original, value, unit))
    return outcomes


def measure(metric: Any, model: Any, ctx: "Context") -> float:
    """Value of a metric for a model, with fewer rows at once where a device is out of memory."""
    return float(
        retry_with_smaller_batches_on_oom(partial(metric.measure, model, ctx), ctx.settings.device, ctx.emit_event)
    )


def _baseline_key(bound: Bound) -> tuple[str, MetricRef]:
    """A profile changes the thread count, so a profiled metric is another metric."""
    metric = bound.metric
    if bound.profile:
        metric = replace(metric, args=(*metric.args, ("on", bound.profile)))
    return bound.baseline or "", metric


def _measure_missing_baselines(bounds: Sequence[Bound], ctx: "Context", known: Known) -> None:
    for name in dict.fromkeys(b.baseline for b in bounds if b.baseline):
        by_key = {_baseline_key(b): b for b in bounds if b.baseline == name}
        missing = {key: b for key, b in by_key.items() if key not in known}
        if not missing:
            continue
        origin = baseline_origin(name, ctx)
        model = origin.load().eval()
        for key, bound in ctx.each(list(missing.items()), f"expect {name}", len(missing)):
            with with_profile_threads(bound.profile, ctx):
                known[key] = measure(ctx.metric(bound.metric), model, ctx)
        origin.refuse_changed_files()
        del model


def baseline_origin(name: str, ctx: "Context") -> Any:
    """The origin of a model that the recipe declares."""
    call = ctx.recipe.models[name]
    with diagnostics_located_at(call.span):
        origin = ctx.registry.make("model", call).resolve(ctx.relative_to(call))
    return origin.located_at(call.span, ctx.settings.device)


def unmet_bound_diagnostics(outcomes: Sequence[Outcome], undecided: str = "fail") -> list[Diagnostic]:
    """A diagnostic at the recipe line of every bound that was missed or left open, a warning for every one skipped.

    undecided   "fail", or "pass" for a warning
    """
    diagnostics = []
    for o in outcomes:
        if o.skipped:
            message = f"`{bound_text(o.bound)}` was not measured"
            diagnostics.append(bound_skipped(message, o.bound.span, note=o.skipped))
        elif o.undecided:
            fault = bound_undecided if undecided == "fail" else bound_left_open
            diagnostics.append(
                fault(
                    f"`{bound_text(o.bound)}` is undecided on this machine",
                    o.bound.span,
                    note=o.undecided,
                    help="measure on a machine at rest, or loosen the bound",
                )
            )
        elif not o.passed:
            diagnostics.append(_missed_bound_diagnostic(o))
    return diagnostics


def _missed_bound_diagnostic(outcome: Outcome) -> Diagnostic:
    assert outcome.value is not None, "a skipped bound is no miss"
    name = metric_label(outcome.bound)
    name += f"` of `{outcome.where}" if outcome.where else ""
    measured = measurement_text(outcome.value, outcome.unit)
    message = f"`{name}` is {measured}, {_VERDICT_WORDS[outcome.bound.op]} {outcome.limit}"
    if math.isnan(outcome.value):
        message = f"`{name}` is not a number"
    note = (
        f"`{outcome.bound.baseline}` measures {measurement_text(outcome.original, outcome.unit)}"
        if outcome.original is not None
        else ""
    )
    return expectation_missed(message, outcome.bound.span, note=note)


def bound_text(bound: Bound) -> str:
    """A bound as it was written."""
    if bound.span:
        return " ".join(bound.span.text.split())
    limit = value_text(bound.limit)
    factor = f"{limit} * {bound.baseline}" if bound.baseline else limit
    where = f" on {bound.profile}" if bound.profile else ""
    return f"{value_text(bound.metric)} {bound.op} {factor}{where}"


def metric_label(bound: Bound) -> str:
    """The metric of a bound as it was written."""
    source_text = bound_text(bound).split(f" {bound.op} ", 1)[0] if bound.span else ""
    return source_text or value_text(bound.metric)

"""A baseline: what a recipe's artifacts measured when somebody was content, kept beside the recipe for CI.

`NAME.baseline.json` lies beside `NAME.effspec` and goes into version control. It holds measures, how far each may
move, and the machine. What a clock says is compared as a ratio to the original, which ran in turns with it.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....dsl.checker.recipe import Bound
from ....dsl.checker.values import DataRef, references_in
from ....dsl.syntax.diagnostics import Diagnostic, Fault, Reject
from ....dsl.syntax.source import Span
from ...analysis.planning import keys
from ...artifacts.manifest import Measure
from ...core.cache import write_atomic
from ...core.fingerprint import machine_facts
from ...core.quantity import change_text, distinguishable_value_texts, measurement_text, significant_digits
from ...core.safe_read import MALFORMED, MIB, read_json
from ...evaluation.confidence import median_interval
from .gate import metric_label

if TYPE_CHECKING:
    from ...analysis.planning.plan import Plan
    from ...plugin.context import Context
    from .retest import Tested

FORMAT = 1
EXACT = ("params", "flops")  # counts of shapes: no library moves them
COUNTS = (*EXACT, "bytes")
ROUNDING = 1e-5  # what other code of one instruction set does to a sum: libraries choose by the processor
SAME = ("effc", "torch", "transformers", "isa", "threads")  # what decides the bits of a result
CLOCKED = ("cpu", "isa", "threads")  # what decides how fast one model is against another
# How far a measure may move to the worse, as a share: of what is computed by other versions, and of a ratio of times.
TOLERANCE = {"quality": 0.01, "time": 0.1}

baseline_missed = Fault(
    "baseline-missed",
    "A measure is worse than the recipe's baseline allows.\n\n"
    "On the machine and the versions of the baseline all but times must be as they were, to rounding. Elsewhere they "
    "may move by the `tolerance` in it, and ratios of times by theirs. Where the change is meant, "
    "`effc test RECIPE --bless` writes a new baseline.",
    exit="gate",
)
baseline_undecided = Fault(
    "baseline-undecided",
    "A ratio of times lies beyond the baseline's tolerance, but swings too much to say so with confidence.\n\n"
    "So the exit code is that of a missed bound; `--undecided pass` lets it through.",
    exit="gate",
)
baseline_open = Fault(
    "baseline-open",
    "A ratio of times could not be decided, and `--undecided pass` lets it through.",
    severity="warning",
)
baseline_gone = Fault(
    "baseline-gone",
    "A baseline holds a measure that nothing measures any more.\n\n"
    "A bound was taken out of the recipe, or the file was edited: what it held is not held now.",
    severity="warning",
)
foreign_baseline = Fault(
    "foreign-baseline",
    "A baseline was written for another recipe, another model or other data.\n\n"
    "Numbers of different questions say nothing of each other. `effc test RECIPE --bless` writes a new one.",
    exit="usage",
)
broken_baseline = Fault("broken-baseline", "A file of the name of a baseline is none.", exit="usage")
nothing_blessed = Fault(
    "nothing-blessed",
    "`--bless` was given, but what was measured is nothing to hold others to.\n\n"
    "A baseline holds every artifact of a recipe, and each keeps its bounds.",
    exit="gate",
)


@dataclass(frozen=True)
class Drift:
    """One measure against the baseline's.

    state   "same", "moved" (within tolerance), "better", "worse", "undecided", "new", "gone", or "elsewhere": a time of
            another machine
    then, now, limit   in `unit`; where a clock measured (`clocked`) ratios to the original
    span    of the bound that names the metric, or of the pipeline
    """

    metric: str
    unit: str
    state: str
    then: float | None
    now: float | None
    limit: float | None = None
    span: Span | None = None
    clocked: bool = False

    def text(self) -> str:
        """`1.02 against 0.9`."""
        if self.now is None:
            return "not measured any more"
        if self.then is None:
            return measurement_text(self.now, self.unit)
        return " against ".join(distinguishable_value_texts(self.now, self.then, self.unit))

    def to_json(self) -> dict[str, Any]:
        def finite(x: float | None) -> float | str | None:
            return x if x is None or math.isfinite(x) else str(x)

        names = ("then", "now", "limit")
        return {"metric": self.metric, "unit": self.unit, "state": self.state} | {
            n: finite(getattr(self, n)) for n in names
        }


def baseline_path(recipe: Path) -> Path:
    return recipe.with_suffix(".baseline.json")


# -- writing -------------------------------------------------------------------------------------------------


def write_baseline(recipe_path: Path, results: "Sequence[Tested]", context_of_plan: "Any") -> Path:
    """Write the baseline of a recipe; `context_of_plan` makes the Context of a plan. Raises Reject where a bound is
    missed."""
    missed = [d for r in results for d in r.diagnostics if d.severity == "error" and d.fault not in BASELINE_FAULTS]
    if missed:
        raise Reject(
            *missed, nothing_blessed("a bound is missed, so nothing was blessed", help="mend the recipe or its bounds")
        )
    body = {
        "format": FORMAT,
        "recipe": recipe_path.name,
        "machine": machine_facts(),
        "tolerance": TOLERANCE,
        "artifacts": [
            {
                **baseline_entry_key(r.plan, r.name),
                "inputs": input_identities(r.plan, context_of_plan(r.plan)),
                "measures": [
                    _baseline_measure(m, r) for m in r.compared.measures if _is_compared_with_baseline(m.metric, r)
                ],
            }
            for r in results
        ],
    }
    text = json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(baseline_path(recipe_path), text.encode())
    return baseline_path(recipe_path)


def _is_compared_with_baseline(metric_name: str, result: "Tested") -> bool:
    """Whether a measure is held: all but times that no bound reads, since those swing on a machine that others use.

    Nor is what a bound `with confidence` alone reads: which rows those are hangs on the model.
    """
    expects, name = result.plan.pipeline.expects, metric_name.partition(" of ")[0]
    confident, plain = ({metric_label(b) for b in expects if (b.confidence is not None) == c} for c in (True, False))
    if name in confident - plain:
        return False
    return metric_name not in result.compared.ratios or name in plain


def _baseline_measure(measure: Measure, result: "Tested") -> dict[str, Any]:
    clocked = measure.metric in result.compared.ratios
    value = measure.ratio if clocked else measure.compiled
    if value is None or not math.isfinite(value):
        raise nothing_blessed(f"`{measure.metric}` is {value}, which is nothing to compare with").rejection()
    return {
        "metric": measure.metric,
        "unit": "" if clocked else measure.unit,
        "value": value,
        "better": measure.better,
        "clocked": clocked,
    }


def input_identities(plan: "Plan", ctx: "Context") -> dict[str, str]:
    """Identities of a baseline's inputs: the model, and the data of every bound."""
    data_refs = {ref for bound in plan.pipeline.expects for ref in references_in(dict(bound.metric.args), DataRef)}
    return {"model": plan.identity} | {
        f"data {ref.name}": keys.data_identity(ref, ctx) for ref in sorted(data_refs, key=lambda ref: ref.name)
    }


# -- reading -------------------------------------------------------------------------------------------------


def read_baseline(recipe_path: Path) -> dict[str, Any] | None:
    """The baseline beside a recipe, checked; None where there is none."""
    file = baseline_path(recipe_path)
    try:
        body = read_json(file, MIB)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise broken_baseline(f"{file} is no JSON that can be read", help=_REMEDY).rejection() from error
    try:
        _check_baseline_form(body)
    except MALFORMED as error:
        reason = f"it has no `{error.args[0]}`" if isinstance(error, KeyError) else str(error)
        reason = "a part is of another form" if isinstance(error, TypeError) else reason
        raise broken_baseline(f"{file} is no baseline: {reason}", help=_REMEDY).rejection() from error
    if body["recipe"] != recipe_path.name:
        raise foreign_baseline(
            f"{file} was written for {body['recipe']}, not for {recipe_path.name}", help=_REMEDY
        ).rejection()
    return body


_REMEDY = "look at what it says, then write it again with `effc test RECIPE --bless`"


def _check_baseline_form(baseline: Any) -> None:
    """Raises ValueError, KeyError or TypeError where a part is of another form."""
    if baseline["format"] != FORMAT:
        raise ValueError(f"format {str(baseline['format'])[:20]}")
    texts = [baseline["recipe"], *(a[n] for a in baseline["artifacts"] for n in ("pipeline", "variant", "artifact"))]
    measures = [m for a in baseline["artifacts"] for m in a["measures"]]
    texts += [m[n] for m in measures for n in ("metric", "unit", "better")]
    texts += [text for a in baseline["artifacts"] for pair in a["inputs"].items() for text in pair]
    if not all(isinstance(text, str) and text.isprintable() for text in texts):
        raise ValueError("a name is no text of one line")
    tolerance = baseline["tolerance"]
    shares = [float(tolerance[name]) for name in TOLERANCE]
    values = [float(m["value"]) for m in measures]
    if not all(math.isfinite(x) for x in (*shares, *values)) or min(shares) < 0:
        raise ValueError("a number is none that a baseline has")
    if any(x < 0 for m, x in zip(measures, values, strict=True) if m["clocked"] or m["metric"] in COUNTS):
        raise ValueError("a count, or a ratio of times, is negative")
    if not all(isinstance(m["clocked"], bool) for m in measures) or not isinstance(baseline["machine"], dict):
        raise ValueError("a field is of another form")


# -- comparing -----------------------------------------------------------------------------------------------


def find_comparable_entry(
    baseline: Mapping[str, Any], artifact_key: Mapping[str, str], plan: "Plan", ctx: "Context"
) -> Mapping[str, Any]:
    """Entry of an artifact in a baseline. Raises Reject (foreign-baseline), before anything is measured."""
    entry = next((a for a in baseline["artifacts"] if {n: a[n] for n in artifact_key} == dict(artifact_key)), None)
    if entry is None:
        message = f"the baseline has no artifact `{artifact_key['artifact']}` of pipeline `{artifact_key['pipeline']}`"
        raise foreign_baseline(message, plan.pipeline.span, help=_REMEDY).rejection()
    current = input_identities(plan, ctx)
    for name in sorted(current.keys() & entry["inputs"].keys()):
        if current[name] != entry["inputs"][name]:
            message = f"{name} is another than when the baseline was written"
            raise foreign_baseline(message, _span_of_input(name, plan), help=_REMEDY).rejection()
    return entry


def widest_baseline_bound(recipe_path: Path, plan: "Plan", same_metric: Bound) -> Bound | None:
    """Bound that a baseline sets on the metric of another: the widest limit of the pipeline's artifacts; None where it
    has none, or times, which hold on one machine alone."""
    body = read_baseline(recipe_path)
    key = (plan.pipeline.name, plan.recipe.variant)
    entries = [a for a in body["artifacts"] if (a["pipeline"], a["variant"]) == key] if body else []
    measures = [
        m for a in entries for m in a["measures"] if m["metric"] == metric_label(same_metric) and not m["clocked"]
    ]
    if body is None or not measures:
        return None
    better, tolerance = measures[0]["better"], float(body["tolerance"]["quality"])
    exact = metric_label(same_metric) in EXACT
    limits = [
        float(m["value"]) if exact else _value_worsened_by_share(float(m["value"]), tolerance, better) for m in measures
    ]
    op, limit = ("<=", max(limits)) if better == "lower" else (">=", min(limits))
    return Bound(same_metric.metric, op, limit)


def baseline_entry_key(plan: "Plan", artifact: str) -> dict[str, str]:
    """Key of an artifact in a baseline."""
    return {"pipeline": plan.pipeline.name, "variant": plan.recipe.variant, "artifact": artifact}


def compare_to_baseline(baseline: Mapping[str, Any], entry: Mapping[str, Any], result: "Tested") -> tuple[Drift, ...]:
    """Compare every measure of an artifact with what the baseline has of it."""
    previous = {m["metric"]: m for m in entry["measures"]}
    current = {
        m.metric: m
        for m in result.compared.measures
        if m.metric in previous or _is_compared_with_baseline(m.metric, result)
    }
    return tuple(
        _drift_of_measure(name, previous.get(name), current.get(name), result, baseline)
        for name in dict.fromkeys([*current, *previous])
    )


def _span_of_input(input_name: str, plan: "Plan") -> Span | None:
    kind, _, data = input_name.partition(" ")
    return (plan.recipe.data[data] if kind == "data" else plan.recipe.models[plan.pipeline.model]).span


def _drift_of_measure(
    metric_name: str, previous: Any, current: Measure | None, result: "Tested", baseline: Mapping[str, Any]
) -> Drift:
    span = _bound_span(metric_name, result)
    if current is None:
        return Drift(metric_name, previous["unit"], "gone", float(previous["value"]), None, None, span)
    ratios = result.compared.ratios.get(metric_name)
    value = current.ratio if ratios is not None else current.compiled
    unit = "" if ratios is not None else current.unit
    if previous is None or value is None or previous["clocked"] != (ratios is not None):
        return Drift(metric_name, unit, "new", None, value, None, span)
    old, this_machine = float(previous["value"]), machine_facts()
    if ratios is not None:
        if _differing_machine_facts(baseline, this_machine, CLOCKED):
            return Drift(metric_name, unit, "elsewhere", old, value, None, span)
        limit = _value_worsened_by_share(old, float(baseline["tolerance"]["time"]), current.better)
        interval = median_interval(ratios) or (min(ratios), max(ratios))
        state = _timed_drift_state(value, interval, limit, old, current.better)
        return Drift(metric_name, unit, state, old, value, limit, span, clocked=True)
    exact = not _differing_machine_facts(baseline, this_machine, SAME)
    is_exact_count = metric_name.partition(" of ")[0] in EXACT
    tolerance = ROUNDING if exact else float(baseline["tolerance"]["quality"])
    limit = old if is_exact_count else _value_worsened_by_share(old, tolerance, current.better)
    if value == old or (not is_exact_count and exact and abs(value - old) <= ROUNDING * abs(old)):
        state = "same"
    elif _is_worse_than_limit(value, limit, current.better):
        state = "worse"
    else:
        state = "moved" if _is_worse_than_limit(value, old, current.better) else "better"
    return Drift(metric_name, unit, state, old, value, limit, span)


def _timed_drift_state(
    value: float, interval: tuple[float, float], limit: float, baseline_value: float, better: str
) -> str:
    """Worse where all of the interval is; a median beyond the limit whose interval is not decides nothing."""
    nearest = interval[0] if better == "lower" else interval[1]
    if _is_worse_than_limit(nearest, limit, better):
        return "worse"
    if _is_worse_than_limit(value, limit, better):
        return "undecided"
    return "moved" if _is_worse_than_limit(value, baseline_value, better) else "better"


def _is_worse_than_limit(value: float, limit: float, better: str) -> bool:
    """Whether a value lies on the wrong side of a limit; one that is no number always does."""
    return not (value <= limit if better == "lower" else value >= limit)


def _value_worsened_by_share(value: float, share: float, better: str) -> float:
    return value + (abs(value) * share if better == "lower" else -abs(value) * share)


def _differing_machine_facts(
    baseline: Mapping[str, Any], this_machine: Mapping[str, Any], fact_names: Sequence[str]
) -> list[str]:
    return [name for name in fact_names if baseline["machine"].get(name) != this_machine.get(name)]


def _bound_span(name: str, result: "Tested") -> Span | None:
    """The line that set a bound on the metric; else the pipeline's."""
    metric = name.partition(" of ")[0]
    bound = next((b for b in result.plan.pipeline.expects if metric_label(b) == metric), None)
    return bound.span if bound and bound.span else result.plan.pipeline.span


BASELINE_FAULTS = (baseline_missed, baseline_undecided, baseline_open, baseline_gone)


def drift_diagnostics(
    drifts: Sequence[Drift], baseline: Mapping[str, Any], undecided_policy: str
) -> Iterator[Diagnostic]:
    """A diagnostic for each measure that is worse than the baseline allows, or may be."""
    differing = ", ".join(_differing_machine_facts(baseline, machine_facts(), SAME))
    note = f"the baseline was written with another {differing}" if differing else ""
    for d in drifts:
        if d.state == "gone":
            complaint = f"`{d.metric}` stands in the baseline, and nothing measures it now"
            yield baseline_gone(complaint, d.span, help="give it a bound again, or write a new baseline with `--bless`")
        if d.state not in ("worse", "undecided") or d.then is None or d.now is None or d.limit is None:
            continue
        prefix = "the ratio of " if d.clocked else ""
        difference = change_text(d.then, d.now)
        previous, current = (
            (significant_digits(d.then), significant_digits(d.now))
            if d.clocked
            else distinguishable_value_texts(d.then, d.now, d.unit)
        )
        limit = (
            previous
            if d.limit == d.then
            else significant_digits(d.limit)
            if d.clocked
            else distinguishable_value_texts(d.limit, d.now, d.unit)[0]
        )
        message = f"{prefix}`{d.metric}` was {previous} and is {current} ({difference}), at worst {limit}"
        fault, help = baseline_missed, "if that is meant, write a new baseline with `--bless`"
        if d.state == "undecided":
            fault = baseline_undecided if undecided_policy == "fail" else baseline_open
            help = "test again where nothing else runs; `--undecided pass` lets it through"
        yield fault(message, d.span, note=note, help=help)

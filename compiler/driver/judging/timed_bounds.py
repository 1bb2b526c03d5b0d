"""Whether timings decide a bound: their confidence interval lies on one side of it, or it is left open."""

from ....dsl.checker.recipe import Bound
from ...core.quantity import measurement_text
from ...evaluation.confidence import CONFIDENCE, median_interval
from ...evaluation.timing import InterleavedTimes
from .gate import is_decided, judge_bound

SECONDS = 60.0  # for which a timed bound is measured again until it is decided


def metric_confidence_interval(
    bound: Bound, timings: InterleavedTimes, baseline_value: float
) -> tuple[float, float] | None:
    """Confidence interval of the metric, in its unit; None after too few rounds.

    Of a bound on a factor it follows from the ratios within each round, which what else the machine does leaves alone.
    """
    if bound.baseline:
        ratios = median_interval(timings.ratios)
        return ratios and (ratios[0] * baseline_value, ratios[1] * baseline_value)
    return median_interval(timings.compiled)


def interval_decides(bound: Bound, timings: InterleavedTimes, original: float, unit: str = "") -> bool:
    bounds = metric_confidence_interval(bound, timings, original)
    return bounds is not None and is_decided(bound, original if bound.baseline else None, bounds, unit)


def undecided_reason(bound: Bound, timings: InterleavedTimes, baseline_value: float, unit: str) -> str:
    """Why a bound is left open, as a sentence; "" where it is decided."""
    if interval_decides(bound, timings, baseline_value, unit):
        return ""
    bounds = metric_confidence_interval(bound, timings, baseline_value)
    rounds = f"after {len(timings.rounds)} rounds"
    if bounds is None:
        return f"{rounds} there are too few to decide"
    limit = judge_bound(bound, baseline_value if bound.baseline else None, bounds[0], unit).limit
    return (
        f"{rounds} it lies between {measurement_text(bounds[0], unit)} and {measurement_text(bounds[1], unit)} "
        f"with {CONFIDENCE:.0%} confidence; the limit is {limit}"
    )

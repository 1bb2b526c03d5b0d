"""Whether timings decide a bound: their confidence interval lies on one side of it, or it is left open."""

from ....dsl.checker.recipe import Bound
from ...core.quantity import measured
from ...evaluation.confidence import CONFIDENCE, median_interval
from ...evaluation.timing import Turns
from .gate import judge

SECONDS = 60.0  # for which a timed bound is measured again until it is decided


def interval(bound: Bound, turns: Turns, original: float) -> tuple[float, float] | None:
    """What the metric is with confidence, in its unit; None after too few rounds.

    Of a bound on a factor it follows from the ratios within each round, which what else the machine does leaves alone.
    """
    if bound.baseline:
        ratios = median_interval(turns.ratios)
        return ratios and (ratios[0] * original, ratios[1] * original)
    return median_interval(turns.compiled)


def decides(bound: Bound, turns: Turns, original: float, unit: str = "") -> bool:
    """Whether both ends of the interval, and so all between them, get the same verdict."""
    ends = interval(bound, turns, original)
    if ends is None:
        return False
    low, high = (judge(bound, original if bound.baseline else None, end, unit) for end in ends)
    if bound.op == "in" and not low.holds and not high.holds:
        return ends[1] < low.low or ends[0] > low.high
    return low.holds == high.holds


def openness(bound: Bound, turns: Turns, original: float, unit: str) -> str:
    """Why a bound is left open, as a sentence; "" where it is decided."""
    if decides(bound, turns, original, unit):
        return ""
    ends = interval(bound, turns, original)
    rounds = f"after {len(turns.rounds)} rounds"
    if ends is None:
        return f"{rounds} nothing is sure"
    limit = judge(bound, original if bound.baseline else None, ends[0], unit).limit
    return (
        f"{rounds} it lies between {measured(ends[0], unit)} and {measured(ends[1], unit)} "
        f"with {CONFIDENCE:.0%} confidence; the limit is {limit}"
    )

"""Limits on times that a front's points were timed too noisily for.

What a point takes is a ratio, which its rounds tell well, of what the original takes, which swings with what else the
machine does: between one point and the next by a factor, on a busy one.
"""

import statistics
from collections.abc import Mapping, Sequence
from math import isfinite

from ..artifacts.manifest import Manifest
from ..core.quantity import measurement_text
from ..evaluation.confidence import median_interval
from .point_limits import Limit, Measures


def undecided_reason_by_point(
    front: Manifest, measures_by_point: Mapping[str, Measures], limits: Sequence[Limit]
) -> dict[str, str]:
    """Why nobody knows whether a point keeps a limit on a time, by its name; only of points where that is so."""
    result: dict[str, str] = {}
    for limit in limits:
        for name, measures in measures_by_point.items():
            metric = limit.matching_measure_name(measures)
            interval = point_time_interval(front, name, metric)
            if interval and limit.is_inside_interval(interval, measures[metric][1]):
                low, high = (measurement_text(end, measures[metric][1]) for end in interval)
                result[name] = (
                    f"the machine was too noisy to know whether `{name}` keeps {metric}={limit.value}: "
                    f"{low} to {high} fit what was timed; compile on a quiet machine to know"
                )
    return result


def point_time_interval(front: Manifest, point: str, metric: str) -> tuple[float, float] | None:
    """Least and most seconds that a point may take: the interval of its ratio, times the least and the most that the
    original took beside any point. None where no clock measured the point in turns with the original."""
    rounds = {
        name: _paired_times_by_round(front, f"{metric} of {name}") for name in (str(m["name"]) for m in front.members)
    }
    originals = [statistics.median(original for original, _ in pairs) for pairs in rounds.values() if pairs]
    ratios = [compiled / original for original, compiled in rounds.get(point, [])]
    if not ratios:
        return None
    low, high = median_interval(ratios) or (min(ratios), max(ratios))
    return low * min(originals), high * max(originals)


def _paired_times_by_round(front: Manifest, metric: str) -> list[tuple[float, float]]:
    """Times of the original and of a point, round by round; none of what is no record of both."""
    timings = front.run.get("timings")
    record = timings.get(metric) if isinstance(timings, Mapping) else None
    columns = [record.get(name) for name in ("original", "compiled")] if isinstance(record, Mapping) else []
    if len(columns) != 2 or not all(isinstance(column, list) for column in columns):
        return []
    pairs = list(zip(*columns, strict=False))
    positive = all(type(value) in (int, float) and isfinite(value) and value > 0 for pair in pairs for value in pair)
    return pairs if positive else []

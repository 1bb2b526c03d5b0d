"""Times of a front's points over one base, so that points compare.

Each point is timed beside the original, and what the original takes swings between one point and the next. The ratio of
a point holds; its time is that ratio of one time of the original, the median of all that were taken.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...artifacts.manifest import Measure
from .comparison import Comparison
from .gate import BoundVerdict, judge_bound, metric_label


def rebase_on_median_original(comparisons: Sequence[tuple[str, Comparison]]) -> list[tuple[str, Comparison]]:
    """Points whose timed values are their ratios times one time of the original."""
    originals: dict[str, list[float]] = {}
    for _, compared in comparisons:
        for row in compared.measures:
            if row.metric in compared.ratios and row.original:
                originals.setdefault(row.metric, []).append(row.original)
    base = {metric: statistics.median(values) for metric, values in originals.items()}
    return [
        (
            name,
            replace(
                compared,
                measures=tuple(_rebase_measure(row, base) for row in compared.measures),
                outcomes=tuple(_rebase_verdict(verdict, base) for verdict in compared.outcomes),
            ),
        )
        for name, compared in comparisons
    ]


def _rebase_measure(row: Measure, baseline_times: Mapping[str, float]) -> Measure:
    if row.metric not in baseline_times or row.ratio is None:
        return row
    return replace(row, original=baseline_times[row.metric], compiled=baseline_times[row.metric] * row.ratio)


def _rebase_verdict(verdict: BoundVerdict, baseline_times: Mapping[str, float]) -> BoundVerdict:
    """A bound on a factor has the same verdict over any base; one on a time, or an open one, is as it was timed."""
    time = baseline_times.get(metric_label(verdict.bound))
    if time is None or not verdict.original or verdict.value is None or verdict.undecided:
        return verdict
    judged = judge_bound(verdict.bound, time, verdict.value / verdict.original * time, verdict.unit)
    return replace(verdict, value=judged.value, original=time, low=judged.low, high=judged.high)

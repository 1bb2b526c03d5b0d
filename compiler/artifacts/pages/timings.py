"""Timings: every round of the original and of the result, the median and its confidence interval."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...core.quantity import count_text, measurement_text
from ...evaluation.confidence import CONFIDENCE, median_interval
from ..manifest import Manifest
from .chart import FIELD_LABELS, Chart, point_mark, quantitative_encoding, render_chart
from .report_data import finite_number_or_none, list_or_empty, mapping_or_empty, one_line_or_empty

MAX_CHARTS, ROUNDS = 12, 100  # metrics and rounds that are drawn
SHORTEST, LONGEST = 1e-30, 1e30  # values whose ratio is a number
BOTH = ("original", "compiled")
NAMES = {"original": "before", "compiled": "after"}


@dataclass(frozen=True)
class Timing:
    metric: str
    label: str
    chart: Chart


def paired_timing_charts(manifest: Manifest) -> list[Timing]:
    """A drawing for each metric whose rounds were kept."""
    result = []
    for metric, rounds in list(mapping_or_empty(manifest.run.get("timings")).items())[:MAX_CHARTS]:
        values = {name: _plausible_seconds(mapping_or_empty(rounds).get(name)) for name in BOTH}
        if values["original"] and len(values["original"]) == len(values["compiled"]):
            result.append(
                _timing_chart(
                    one_line_or_empty(metric), one_line_or_empty(mapping_or_empty(rounds).get("unit")), values
                )
            )
    return result


def _plausible_seconds(values: Any) -> list[float]:
    return [
        v
        for v in map(finite_number_or_none, list_or_empty(values)[:ROUNDS])
        if v is not None and SHORTEST < v < LONGEST
    ]


def _timing_chart(metric: str, unit: str, values: Mapping[str, Sequence[float]]) -> Timing:
    ratios = [after / before for before, after in zip(*(values[n] for n in BOTH), strict=True)]
    interval = median_interval(ratios)
    sure = f"{count_text(len(ratios), 'round')} are too few to say how sure that is"
    if interval:
        sure = f"between {interval[0]:.2f} and {interval[1]:.2f} with {CONFIDENCE:.0%} confidence"
    noun = "time" if unit in ("s", "ms", "us", "µs") else "value"
    description = f"{statistics.median(ratios):.2f} times the original's {noun} in the median round; {sure}."
    listed = [
        (str(i), *(measurement_text(v, unit) for v in pair), f"{ratios[i - 1]:.3f}")
        for i, pair in enumerate(zip(*(values[n] for n in BOTH), strict=True), 1)
    ]
    note = "A dot is a round, in which both models took turns step by step; the bar ends at the median."
    head = ("round", "before", "after", "ratio")
    return Timing(
        metric,
        description,
        render_chart(
            metric, description, _timing_spec(unit or metric, unit, values), head, listed, height=130, note=note
        ),
    )


def _timing_spec(title: str, unit: str, rounds_by_name: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    values = [
        {"who": NAMES[name], "v": v, "says": f"{NAMES[name]}, round {i}: {measurement_text(v, unit)}"}
        for name in BOTH
        for i, v in enumerate(rounds_by_name[name], 1)
    ]
    medians = {"values": [{"who": NAMES[name], "v": statistics.median(rounds_by_name[name])} for name in BOTH]}
    order = list(NAMES.values())
    labels = {"labelColor": "var(--ink)"}
    scale = {"domain": order, "range": ["var(--base)", "var(--accent)"]}
    return {
        "encoding": {
            "x": quantitative_encoding("v", title),
            "y": {"field": "who", "type": "nominal", "title": None, "sort": order, "axis": labels},
            "color": {"field": "who", "type": "nominal", "legend": None, "scale": scale},
        },
        "layer": [
            {
                "data": medians,
                "mark": {"type": "bar", "height": 22, "opacity": 0.22, "cornerRadiusEnd": 3, "aria": False},
            },
            {
                "data": {"values": values},
                "mark": point_mark(46) | {"opacity": 0.8},
                "encoding": {"description": FIELD_LABELS},
            },
            {"data": medians, "mark": {"type": "tick", "thickness": 3, "height": 26, "opacity": 1, "aria": False}},
        ],
    }

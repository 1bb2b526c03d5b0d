"""A front: its points over two measures, and all measures as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...core.quantity import count_text, measurement_text
from ..front_kinds import members_with_interleaved_times
from ..manifest import Manifest
from .chart import FIELD_LABELS, Chart, point_mark, quantitative_encoding, render_chart

COSTS = ("params", "bytes", "flops", "decode", "prefill")  # go along the bottom
SCALES = {"B": (1 << 20, "MiB"), "bytes": (1 << 20, "MiB"), "params": (1e6, "M")}


@dataclass(frozen=True)
class FrontTable:
    """`charts` is empty where the points have one measure."""

    charts: tuple[Chart, ...]
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def front_table_and_charts(manifest: Manifest) -> FrontTable | None:
    if not manifest.members:
        return None
    members = members_with_interleaved_times(manifest)
    first = members[0]["measures"]
    head = ("point", *(metric for metric, *_ in first), "steps")
    rows = tuple(
        (m["name"], *(measurement_text(value, unit) for _, value, unit, _ in m["measures"]), ", ".join(m["steps"]))
        for m in members
    )
    same_measures = all([n for n, *_ in m["measures"]] == [n for n, *_ in first] for m in members)
    charts = (_scatter_chart(members, head, rows),) if same_measures and len(first) > 1 and len(members) > 1 else ()
    return FrontTable(charts, head, rows)


def _scatter_chart(
    members: Sequence[Mapping[str, Any]], head: tuple[str, ...], rows: tuple[tuple[str, ...], ...]
) -> Chart:
    first = members[0]["measures"]
    up, across = (1, 0) if first[0][0].startswith(COSTS) else (0, 1)
    values = []
    for m in members:
        (y_name, y, y_unit, _), (x_name, x, x_unit, _) = m["measures"][up], m["measures"][across]
        description = f"{m['name']} · {x_name} {measurement_text(x, x_unit)} · {y_name} {measurement_text(y, y_unit)}"
        values.append(
            {
                "x": x / _factor_and_display_unit(x_unit)[0],
                "y": y / _factor_and_display_unit(y_unit)[0],
                "name": m["name"],
                "says": description,
            }
        )
    spec = {
        "data": {"values": values},
        "encoding": {
            "x": quantitative_encoding("x", _axis_title(first[across]), scale={"zero": False, "padding": 40}),
            "y": quantitative_encoding("y", _axis_title(first[up]), scale={"zero": False, "padding": 28}),
        },
        "layer": [
            {"mark": {"type": "line", "color": "var(--line-strong)", "strokeDash": [3, 4], "aria": False}},
            {
                "mark": point_mark(110, color="var(--accent)", stroke="var(--card)", strokeWidth=2),
                "encoding": {"description": FIELD_LABELS},
            },
            {
                "mark": {"type": "text", "dy": -14, "fontSize": 12, "color": "var(--ink)", "aria": False},
                "encoding": {"text": {"field": "name"}},
            },
        ],
    }
    up_name, across_name = first[up][0], first[across][0]
    description = f"{count_text(len(values), 'point')}, {up_name} over {across_name}: " + "; ".join(
        v["says"] for v in values[:20]
    )
    better = " and ".join(f"{first[i][3]} {first[i][0]}" for i in (up, across))
    note = f"Better is {better}."
    return render_chart(f"{up_name} against {across_name}", description, spec, head, rows, note=note, height=340)


def _factor_and_display_unit(unit: str) -> tuple[float, str]:
    return SCALES.get(unit, (1.0, unit))


def _axis_title(measure: Any) -> str:
    name, _, unit, _ = measure
    unit_text = _factor_and_display_unit(unit)[1]
    return f"{name}, {unit_text}" if unit_text else name

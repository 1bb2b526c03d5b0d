"""Training curves: the loss by step, on training rows and on held-out rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...core.quantity import significant_digits
from .chart import FIELD_LABELS, Chart, color_encoding, point_mark, quantitative_encoding, render_chart
from .report_data import finite_number_or_none, list_or_empty

MAX_POINTS = 2000


def training_losses_chart(decisions: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Chart of the losses of training; None where a step trained nothing."""
    course = next((d for d in decisions if list_or_empty(d.get("loss"))), None)
    if course is None:
        return None
    lines = {
        "trained on": _checked_step_loss_pairs(course.get("loss")),
        "held out": _checked_step_loss_pairs(course.get("held_out")),
    }
    values: list[dict[str, Any]] = [
        {"step": step, "loss": loss, "kind": kind, "says": f"{kind}, step {step:.0f}: {significant_digits(loss)}"}
        for kind, points in lines.items()
        for step, loss in points
    ]
    if len(values) < 2:
        return None
    hues = color_encoding([v["kind"] for v in values])
    x, y = (
        quantitative_encoding("step", "step", axis={"format": "~s"}),
        quantitative_encoding("loss", "loss", scale={"zero": False}),
    )
    spec = {
        "data": {"values": values},
        "encoding": {"x": x, "y": y, "color": hues},
        "layer": [
            {"mark": {"type": "line", "strokeWidth": 2, "aria": False}},
            {"mark": point_mark(36), "encoding": {"description": FIELD_LABELS}},
        ],
    }
    curve, best = lines["held out"] or lines["trained on"], finite_number_or_none(course.get("best"))
    description = (
        f"Loss by step: {significant_digits(curve[0][1])} at first, {significant_digits(curve[-1][1])} at last"
    )
    description += f", lowest after step {best:.0f}." if best is not None else "."
    listed = [(v["kind"], f"{v['step']:.0f}", significant_digits(v["loss"])) for v in values]
    return render_chart("Loss while it was trained", description, spec, ("rows", "step", "loss"), listed)


def _checked_step_loss_pairs(value: Any) -> list[tuple[float, float]]:
    pairs = [p for p in list_or_empty(value)[:MAX_POINTS] if isinstance(p, (list, tuple)) and len(p) == 2]
    read = [(finite_number_or_none(step), finite_number_or_none(loss)) for step, loss in pairs]
    return [(step, loss) for step, loss in read if step is not None and loss is not None]

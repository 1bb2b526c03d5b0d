"""Test-time compute: what each way to answer is worth on the dev questions, and what there was to choose from."""

from collections.abc import Iterable, Mapping
from typing import Any

from ...core.quantity import count_text
from .chart import FIELD_LABELS, Chart, color_encoding, point_mark, quantitative_encoding, render_chart
from .report_data import finite_number_or_none, list_or_empty, mapping_or_empty, one_line_or_empty

BRANCHES = {"direct": "direct", "rag": "with samples", "ttt": "after a training"}
CHOICES, POLICY = "choices of the policy", "the policy, on questions held out"
MAX_ROWS = 2000


def accuracy_against_seconds_chart(calibration: Mapping[str, Any]) -> Chart | None:
    """Chart of accuracy over seconds of the calibrated branches; None where nothing was calibrated."""
    by_branch, policy = (
        _accuracy_and_seconds_by_branch(calibration),
        _name_accuracy_seconds([(POLICY, calibration.get("chosen"))]),
    )
    choices = _name_accuracy_seconds((CHOICES, point) for point in list_or_empty(calibration.get("curve")))
    points = [*by_branch, *policy, *choices][:MAX_ROWS]
    if len(points) < 2:
        return None
    values: list[dict[str, Any]] = [
        {"x": seconds, "y": 100 * share, "kind": kind, "says": f"{kind}: {share:.0%} right, {seconds:.3g} s"}
        for kind, share, seconds in points
    ]
    spec = {
        "data": {"values": values},
        "mark": point_mark(70),
        "encoding": {
            "x": quantitative_encoding("x", "seconds a question"),
            "y": quantitative_encoding("y", "right, %", scale={"domain": [0, 100]}),
            "color": color_encoding([v["kind"] for v in values]),
            "description": FIELD_LABELS,
        },
    }
    n_questions = len(list_or_empty(calibration.get("trials")))
    description = f"Share of {count_text(n_questions, 'dev question')} answered rightly over seconds: "
    description += "; ".join(v["says"] for v in values if v["kind"] != CHOICES)
    area = finite_number_or_none(mapping_or_empty(calibration.get("auc")).get("all"))
    reward_note = (
        f" tells right answers from wrong ones with an area of {area:.2f} under the curve." if area is not None else ""
    )
    note = f"The reward `{one_line_or_empty(calibration.get('reward'))}`{reward_note}" if reward_note else ""
    listed = [(kind, f"{share:.0%}", f"{seconds:.3g} s") for kind, share, seconds in points]
    return render_chart(
        "Accuracy against seconds", description, spec, ("way", "right", "a question"), listed, note=note
    )


def _accuracy_and_seconds_by_branch(calibration: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Name, accuracy and mean seconds of each branch alone, over all questions."""
    trials, result = [mapping_or_empty(trial) for trial in list_or_empty(calibration.get("trials"))], []
    for branch, name in BRANCHES.items():
        right = [mapping_or_empty(trial.get("right")).get(branch) is True for trial in trials]
        spent = [finite_number_or_none(mapping_or_empty(trial.get("seconds")).get(branch)) for trial in trials]
        known = [seconds for seconds in spent if seconds is not None]
        if trials and len(known) == len(trials):
            result.append((name, sum(right) / len(right), sum(known) / len(known)))
    return result


def _name_accuracy_seconds(named: Iterable[tuple[str, Any]]) -> list[tuple[str, float, float]]:
    """Name, accuracy and seconds of the points that have both: pairs of thresholds, or prices of a router."""
    read = [
        (
            name,
            finite_number_or_none(mapping_or_empty(p).get("accuracy")),
            finite_number_or_none(mapping_or_empty(p).get("seconds")),
        )
        for name, p in named
    ]
    return [(name, share, seconds) for name, share, seconds in read if share is not None and seconds is not None]

"""Test-time compute: what each way to answer is worth on the dev questions, and what there was to choose from."""

from collections.abc import Mapping
from typing import Any

from ...core.quantity import counted
from .chart import SAYS, Chart, axis, chart, dot, hue
from .sheet import number, rows, table, word

BRANCHES = {"direct": "direct", "rag": "with samples", "ttt": "after a training"}
CHOICES = "choices of the policy"
MOST = 2000


def ways(calibration: Mapping[str, Any]) -> Chart | None:
    """None of what was not calibrated."""
    found = [*_branches(calibration), *_choices(calibration)][:MOST]
    if len(found) < 2:
        return None
    values: list[dict[str, Any]] = [
        {"x": seconds, "y": 100 * share, "kind": kind, "says": f"{kind}: {share:.0%} right, {seconds:.3g} s"}
        for kind, share, seconds in found
    ]
    spec = {
        "data": {"values": values},
        "mark": dot(70),
        "encoding": {
            "x": axis("x", "seconds a question"),
            "y": axis("y", "right, %", scale={"domain": [0, 100]}),
            "color": hue([v["kind"] for v in values]),
            "description": SAYS,
        },
    }
    asked = len(rows(calibration.get("trials")))
    says = f"Share of {counted(asked, 'dev question')} answered rightly over seconds: "
    says += "; ".join(v["says"] for v in values if v["kind"] != CHOICES)
    area = number(table(calibration.get("auc")).get("all"))
    told = (
        f" tells right answers from wrong ones with an area of {area:.2f} under the curve." if area is not None else ""
    )
    note = f"The reward `{word(calibration.get('reward'))}`{told}" if told else ""
    listed = [(kind, f"{share:.0%}", f"{seconds:.3g} s") for kind, share, seconds in found]
    return chart("Accuracy against seconds", says, spec, ("way", "right", "a question"), listed, note=note)


def _branches(calibration: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Each way alone, over all questions."""
    trials, found = [table(trial) for trial in rows(calibration.get("trials"))], []
    for branch, name in BRANCHES.items():
        right = [table(trial.get("right")).get(branch) is True for trial in trials]
        spent = [number(table(trial.get("seconds")).get(branch)) for trial in trials]
        known = [seconds for seconds in spent if seconds is not None]
        if trials and len(known) == len(trials):
            found.append((name, sum(right) / len(right), sum(known) / len(known)))
    return found


def _choices(calibration: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Pairs of thresholds, or prices of a router."""
    read = [(number(table(p).get("accuracy")), number(table(p).get("seconds"))) for p in rows(calibration.get("curve"))]
    return [(CHOICES, share, seconds) for share, seconds in read if share is not None and seconds is not None]

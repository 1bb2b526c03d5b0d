"""The cuts of a search: the score after each over what is saved, among the candidates that were not chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...core.quantity import count_text, si_count, significant_digits
from ..search_summary import search_summary_text
from .chart import FIELD_LABELS, Chart, color_encoding, point_mark, quantitative_encoding, render_chart
from .report_data import finite_number_or_none, mapping_or_empty, one_line_or_empty

DOTS, MAX_ROWS = 400, 2000  # candidates that are drawn, and cuts that are read
KINDS = {"kv_heads": "KV heads"}


@dataclass(frozen=True)
class Cut:
    """`saved` in per cent; `alternatives` are scores of the candidates that stayed."""

    name: str
    kind: str
    score: float
    second: float | None
    saved: float
    alternatives: tuple[float, ...]

    @staticmethod
    def from_decision(decision: Mapping[str, Any]) -> "Cut | None":
        score = finite_number_or_none(decision.get("score"))
        if "cut" not in decision or score is None:
            return None
        name, kind = one_line_or_empty(decision["cut"]), one_line_or_empty(decision.get("kind"))
        scores = {
            n: finite_number_or_none(s)
            for n, s in mapping_or_empty(decision.get("scores")).items()
            if n != decision["cut"]
        }
        other_scores = tuple(s for s in scores.values() if s is not None)
        saved = 100 * (finite_number_or_none(decision.get("share")) or 0.0)
        return Cut(
            name, KINDS.get(kind, kind), score, finite_number_or_none(decision.get("runner_up")), saved, other_scores
        )


def score_after_cuts_chart(decisions: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Chart of the score after each cut; None where a step cut less than twice."""
    steps = [cut for decision in decisions[:MAX_ROWS] if (cut := Cut.from_decision(decision))]
    if len(steps) < 2:
        return None
    by = next((one_line_or_empty(d.get("by")) for d in decisions if d.get("by")), "score")
    n_scores = len(steps) + sum(len(cut.alternatives) for cut in steps)
    description = (
        f"{by} over what is saved, in {count_text(len(steps), 'cut')}: "
        f"{significant_digits(steps[0].score)} after the first, "
        f"{significant_digits(steps[-1].score)} after the last, with {steps[-1].saved:.1f} % saved: "
        f"{search_summary_text(decisions[:MAX_ROWS])}."
    )
    listed = [
        (
            str(i),
            cut.name,
            cut.kind,
            significant_digits(cut.score),
            _number_text_or_empty(cut.second),
            f"{cut.saved:.2f} %",
        )
        for i, cut in enumerate(steps, 1)
    ]
    return render_chart(
        f"{count_text(len(steps), 'cut')}, chosen by {si_count(n_scores)} scores",
        description,
        _score_after_cuts_spec(steps, by),
        ("cut", "what", "kind", by, "runner-up", "saved"),
        listed,
        note=f"A dot is a cut, at the {by} after it. The faint ones are candidates that were scored and not chosen.",
        height=320,
    )


def _score_after_cuts_spec(cut_list: Sequence[Cut], metric_label: str) -> dict[str, Any]:
    low, high = min(cut.score for cut in cut_list), max(cut.score for cut in cut_list)
    extent = (high - low) or abs(high) or 1.0
    least, upper = low - 0.12 * extent, high + 0.35 * extent
    faint = [{"saved": c.saved, "score": s} for c in cut_list for s in c.alternatives if least <= s <= upper]
    dots = [
        {
            "saved": c.saved,
            "score": c.score,
            "kind": c.kind,
            "says": f"cut {i}: {c.name} · {metric_label} {significant_digits(c.score)} · {c.saved:.1f} % saved",
        }
        for i, c in enumerate(cut_list, 1)
    ]
    chosen = point_mark(55, stroke="var(--card)", strokeWidth=1.5)
    return {
        "encoding": {
            "x": quantitative_encoding("saved", "saved, % of the whole", axis={"format": "~g"}),
            "y": quantitative_encoding("score", metric_label, scale={"domain": [least, upper], "nice": False}),
        },
        "layer": [
            {
                "data": {"values": faint[:: -(-len(faint) // DOTS) or 1]},
                "mark": point_mark(14, color="var(--faint)", aria=False) | {"opacity": 0.5},
            },
            {"data": {"values": dots}, "mark": {"type": "line", "color": "var(--line-strong)", "aria": False}},
            {
                "data": {"values": dots},
                "mark": chosen,
                "encoding": {"color": color_encoding([c.kind for c in cut_list]), "description": FIELD_LABELS},
            },
        ],
    }


def _number_text_or_empty(value: float | None) -> str:
    return "" if value is None else significant_digits(value)

"""The cuts of a search: the score after each over what is saved, among the candidates that were not chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...core.quantity import count, counted, digits
from ..search_summary import scored
from .chart import SAYS, Chart, axis, chart, dot, hue
from .sheet import number, table, word

DOTS, MOST = 400, 2000  # candidates that are drawn, and cuts that are read
KINDS = {"kv_heads": "KV heads"}


@dataclass(frozen=True)
class Cut:
    """`saved` in per cent; `others` are scores of the candidates that stayed."""

    name: str
    kind: str
    score: float
    second: float | None
    saved: float
    others: tuple[float, ...]

    @staticmethod
    def of(decision: Mapping[str, Any]) -> "Cut | None":
        score = number(decision.get("score"))
        if "cut" not in decision or score is None:
            return None
        name, kind = word(decision["cut"]), word(decision.get("kind"))
        scores = {n: number(s) for n, s in table(decision.get("scores")).items() if n != decision["cut"]}
        others = tuple(s for s in scores.values() if s is not None)
        saved = 100 * (number(decision.get("share")) or 0.0)
        return Cut(name, KINDS.get(kind, kind), score, number(decision.get("runner_up")), saved, others)


def cuts(decisions: Sequence[Mapping[str, Any]]) -> Chart | None:
    """None where a step cut less than twice."""
    found = [cut for decision in decisions[:MOST] if (cut := Cut.of(decision))]
    if len(found) < 2:
        return None
    by = next((word(d.get("by")) for d in decisions if d.get("by")), "score")
    tried = len(found) + sum(len(cut.others) for cut in found)
    says = (
        f"{by} over what is saved, in {counted(len(found), 'cut')}: {digits(found[0].score)} after the first, "
        f"{digits(found[-1].score)} after the last, with {found[-1].saved:.1f} % saved: {scored(decisions[:MOST])}."
    )
    listed = [
        (str(i), cut.name, cut.kind, digits(cut.score), _or_nothing(cut.second), f"{cut.saved:.2f} %")
        for i, cut in enumerate(found, 1)
    ]
    return chart(
        f"{counted(len(found), 'cut')}, chosen by {count(tried)} scores",
        says,
        _spec(found, by),
        ("cut", "what", "kind", by, "runner-up", "saved"),
        listed,
        note=f"A dot is a cut, at the {by} after it. The faint ones are candidates that were scored and not chosen.",
        height=320,
    )


def _spec(found: Sequence[Cut], by: str) -> dict[str, Any]:
    low, high = min(cut.score for cut in found), max(cut.score for cut in found)
    room = (high - low) or abs(high) or 1.0
    least, most = low - 0.12 * room, high + 0.35 * room
    faint = [{"saved": c.saved, "score": s} for c in found for s in c.others if least <= s <= most]
    dots = [
        {
            "saved": c.saved,
            "score": c.score,
            "kind": c.kind,
            "says": f"cut {i}: {c.name} · {by} {digits(c.score)} · {c.saved:.1f} % saved",
        }
        for i, c in enumerate(found, 1)
    ]
    chosen = dot(55, stroke="var(--card)", strokeWidth=1.5)
    return {
        "encoding": {
            "x": axis("saved", "saved, % of the whole", axis={"format": "~g"}),
            "y": axis("score", by, scale={"domain": [least, most], "nice": False}),
        },
        "layer": [
            {
                "data": {"values": faint[:: -(-len(faint) // DOTS) or 1]},
                "mark": dot(14, color="var(--faint)", aria=False) | {"opacity": 0.5},
            },
            {"data": {"values": dots}, "mark": {"type": "line", "color": "var(--line-strong)", "aria": False}},
            {
                "data": {"values": dots},
                "mark": chosen,
                "encoding": {"color": hue([c.kind for c in found]), "description": SAYS},
            },
        ],
    }


def _or_nothing(value: float | None) -> str:
    return "" if value is None else digits(value)

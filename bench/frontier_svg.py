"""Draw tokens a second against perplexity from the JSON that `bench/frontier.py --json` writes.

    python -m bench.frontier_svg docs/measurements/data/frontier.json docs/frontier.svg

Points of effc are filled circles, those of others squares and triangles; hollow ones were trained. A line joins what no
other point of the same engine beats at both. What computes another model (more than twice the least perplexity) is left
out, and named below.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from bench.tables import latest

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 524, 64, 24, 80, 64
COLORS = {
    "effc": "#0f766e",
    "llama.cpp": "#b45309",
    "ik_llama.cpp": "#7c3aed",
    "OpenVINO": "#1d4ed8",
    "ONNX Runtime": "#be185d",
    "torchao": "#4b5563",
}
FONT = 12
LETTER = 7.2  # width of a letter of the widest of common fonts, DejaVu Sans
OFFSETS = (
    (9, 4),
    (9, -8),
    (9, 16),
    (-9, 4),
    (-9, -8),
    (-9, 16),
    (0, -11),
    (0, 21),
    (9, 28),
    (9, -20),
    (-9, 28),
    (-9, -20),
    (9, -32),
)
Box = tuple[float, float, float, float]


def main() -> None:
    source, target = map(Path, sys.argv[1:3])
    report = json.loads(source.read_text())
    points = latest(report["rows"])
    best = min(r["perplexity"] for r in points)
    rows = [r for r in points if r["perplexity"] <= 2 * best]
    others = [r for r in points if r not in rows]
    target.write_text("\n".join([*drawing(rows, others, report), "</svg>", ""]))


def drawing(rows: Sequence[dict], others: Sequence[dict], report: dict) -> Iterator[str]:
    low, high = min(r["perplexity"] for r in rows) - 0.4, max(r["perplexity"] for r in rows) + 1.0
    fastest = 50 * -(-(1.05 * max(r["tokens_s"] for r in rows)) // 50)

    def at(row: dict) -> tuple[float, float]:
        x = LEFT + (row["perplexity"] - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - row["tokens_s"] / fastest * (HEIGHT - TOP - BOTTOM)

    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="{FONT}" '
        'font-family="system-ui, sans-serif">'
    )
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    yield f'<text x="{LEFT}" y="24" font-size="15" font-weight="600">{escape(report["model"])}: faster is up, better is left</text>'
    yield from legend(report, {r["engine"] for r in rows if r["date"] != max(r["date"] for r in rows)})
    for step in range(0, int(fastest) + 1, 50):
        y = at({"perplexity": low, "tokens_s": step})[1]
        yield f'<path d="M{LEFT} {y:.0f}H{WIDTH - RIGHT}" stroke="#e5e7eb"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.0f}" text-anchor="end" fill="#6b7280">{step}</text>'
    for value in range(int(low) + 1, int(high) + 1):
        x = at({"perplexity": value, "tokens_s": 0})[0]
        yield f'<text x="{x:.0f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="#6b7280">{value}</text>'
    yield f'<text x="{LEFT}" y="{TOP - 8}" fill="#374151">tokens a second</text>'
    yield f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - BOTTOM + 36}" text-anchor="end" fill="#374151">perplexity, geometric mean of three texts</text>'
    if others:
        names = ", ".join(f"{r['engine']} {r['label']} ({r['perplexity']:.0f})" for r in others)
        yield f'<text x="{LEFT}" y="{HEIGHT - 10}" fill="#6b7280">Not drawn, its numbers are wrong: {escape(names)}</text>'
    for engine in engines_of(rows):
        color = COLORS[engine]
        corners = " L".join(
            f"{x:.1f} {y:.1f}"
            for x, y in (at(r) for r in untrained_pareto_front([r for r in rows if r["engine"] == engine]))
        )
        yield f'<path d="M{corners}" fill="none" stroke="{color}" stroke-opacity="0.35" stroke-width="2"/>'
    yield from points_and_labels([(row, *at(row)) for row in rows])


def legend(report: dict, other_days: set[str]) -> Iterator[str]:
    engines = engines_of(report["rows"])
    x = LEFT + 6.0
    for engine in engines:
        yield mark(engine, False, x, 44)
        yield f'<text x="{x + 10:.0f}" y="48" fill="{COLORS[engine]}">{engine}</text>'
        x += 34 + LETTER * len(engine)
    if any("trained" in row["label"] for row in report["rows"]):
        yield mark("effc", True, x, 44) + f'<text x="{x + 10:.0f}" y="48" fill="#374151">trained</text>'
    late = f"; {', '.join(sorted(other_days))} on another day" if other_days else ""
    yield f'<text x="{LEFT + 120}" y="{TOP - 8}" fill="#6b7280">on {escape(report["machine"] + late)}</text>'


def engines_of(rows: Sequence[dict]) -> list[str]:
    return [engine for engine in COLORS if any(row["engine"] == engine for row in rows)]


def untrained_pareto_front(rows: Sequence[dict]) -> list[dict]:
    """Untrained rows that none of the others beats at both, by perplexity."""
    rows = [r for r in rows if "trained" not in r["label"]]
    kept = [
        r for r in rows if not any(o["perplexity"] < r["perplexity"] and o["tokens_s"] > r["tokens_s"] for o in rows)
    ]
    return sorted(kept, key=lambda r: r["perplexity"])


def mark(engine: str, trained: bool, x: float, y: float) -> str:
    fill = "white" if trained else COLORS[engine]
    style = f'fill="{fill}" stroke="{COLORS[engine]}" stroke-width="1.5"'
    if engine == "effc":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {style}/>'
    if engine == "llama.cpp":
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" {style}/>'
    return f'<path d="M{x:.1f} {y - 5:.1f}l5 9h-10z" {style}/>'


def points_and_labels(points: Sequence[tuple[dict, float, float]]) -> Iterator[str]:
    """Marks, and a label beside each where it covers no mark and no other label."""
    marks: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for _, x, y in points]
    labels: list[Box] = []

    def covered(label: Box) -> float:
        return sum(overlap(label, t) for t in labels) + 5 * sum(overlap(label, t) for t in marks)

    for row, x, y in points:
        yield mark(row["engine"], "trained" in row["label"], x, y)
    for row, x, y in sorted(points, key=lambda p: (p[0]["engine"] != "effc", -p[0]["tokens_s"])):
        width = LETTER * len(row["label"])
        boxes = [box(x + dx, y + dy, width, dx) for dx, dy in OFFSETS]
        index = min(range(len(boxes)), key=lambda i: (covered(boxes[i]), i))
        dx, dy = OFFSETS[index]
        labels.append(boxes[index])
        anchor = "start" if dx > 0 else "end" if dx < 0 else "middle"
        yield (
            f'<text x="{x + dx:.0f}" y="{y + dy:.0f}" text-anchor="{anchor}" fill="{COLORS[row["engine"]]}">'
            f"{escape(row['label'])}</text>"
        )


def box(x: float, y: float, width: float, side: float) -> Box:
    left = x if side > 0 else x - width if side < 0 else x - width / 2
    return left, y - FONT + 2, left + width, y + 3


def overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    outside = max(0.0, a[2] - (WIDTH - RIGHT)) + max(0.0, LEFT - a[0])
    return max(0.0, width) * max(0.0, height) + 100 * outside


if __name__ == "__main__":
    main()

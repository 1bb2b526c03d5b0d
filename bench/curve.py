"""Draw accuracy against bytes, a line for every method: what `bench.clients --looks ... --json FILE` wrote.

    python -m bench.curve FILE [--arms 'NAME;NAME'] > curve.svg

Across: what all clients have sent and been sent until then, on the wire, each round taken to cost what the last did
(logarithmic). Up: the mean of the clients' accuracy over the seeds; a bar from the worst seed to the best.
"""

import argparse
import json
import math
import statistics
import sys
from html import escape
from pathlib import Path

WIDE, HIGH, LEFT, TOP, SIDE = 520, 320, 50, 20, 230
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
Point = tuple[float, float, float, float]  # MiB, mean, worst and best accuracy


def points_by_round(runs: list[dict]) -> list[Point]:
    """Of one method, by round."""
    made = []
    for look in sorted(runs[0]["looks"], key=int):
        seeds = [statistics.mean(run["looks"][look]) for run in runs]
        each = statistics.mean(run["up"] + run["down"] for run in runs)
        made.append((int(look) * each / 2**20, statistics.mean(seeds), min(seeds), max(seeds)))
    return made


def draw_svg(methods: dict[str, list[Point]]) -> str:
    """The picture as SVG."""
    every = [p for line in methods.values() for p in line]
    low, high = (math.log10(end(p[0] for p in every)) for end in (min, max))
    bottom, top = min(p[2] for p in every) - 0.02, max(p[3] for p in every) + 0.02

    def x(size: float) -> float:
        return LEFT + WIDE * (math.log10(size) - low) / max(high - low, 1e-9)

    def y(removed_share: float) -> float:
        return TOP + HIGH * (top - removed_share) / (top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDE + SIDE}" height="{TOP + HIGH + 50}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT + WIDE / 2}" y="{TOP + HIGH + 40}" text-anchor="middle">MiB sent by and to all clients</text>',
    ]
    for share in range(math.ceil(bottom * 20), math.floor(top * 20) + 1):
        at = y(share / 20)
        parts.append(
            f'<path d="M{LEFT} {at:.1f}h{WIDE}" stroke="#ddd"/><text x="8" y="{at + 4:.1f}">{share / 20:.2f}</text>'
        )
    for size in sorted({min(p[0] for p in every), max(p[0] for p in every)}):
        parts.append(f'<text x="{x(size):.1f}" y="{TOP + HIGH + 20}" text-anchor="middle">{size:.2f} MiB</text>')
    for number, (name, line) in enumerate(methods.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x(p[0]):.1f},{y(p[1]):.1f}" for p in line)
        bars = "".join(f"M{x(p[0]):.1f} {y(p[2]):.1f}V{y(p[3]):.1f}" for p in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<path d="{bars}" stroke="{colour}"/>')
        at = TOP + 14 + 18 * number
        parts.append(f'<text x="{LEFT + WIDE + 14}" y="{at}" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"])


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("file", type=Path)
    asked.add_argument("--arms", help="Their names, with semicolons between; all where nothing is given.", default="")
    given = asked.parse_args()
    arms = json.loads(given.file.read_text())["arms"]
    names = [name for name in given.arms.split(";") if name in arms] or list(arms)
    sys.stdout.write(draw_svg({name: points_by_round(arms[name]) for name in names}) + "\n")


if __name__ == "__main__":
    main()

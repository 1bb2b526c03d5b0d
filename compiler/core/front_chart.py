"""Points over two measures, as text and as SVG."""

from collections.abc import Sequence
from html import escape

# A point: its number or name, and its values at the two measures.
ChartPoint = tuple[str, float, float]
COLUMNS, ROWS = 56, 14
WIDTH, HEIGHT, EDGE = 640, 400, 60


def ascii_scatter_plot(points: Sequence[ChartPoint], x_label: str, y_label: str) -> str:
    """A plot of numbers: `x_label` grows to the right, `y_label` upwards; what lies on the same place shares it."""
    grid = [[" "] * (COLUMNS + 3) for _ in range(ROWS)]
    for name, x, y in reversed(_scale_points_to_area(points, COLUMNS - 1, ROWS - 1)):
        for i, letter in enumerate(name[:3]):
            grid[ROWS - 1 - round(y)][round(x) + i] = letter
    lines = [f"  {y_label}", *(f"  |{''.join(row).rstrip()}" for row in grid), f"  +{'-' * COLUMNS}", f"   {x_label}"]
    return "\n".join(lines)


def svg_scatter_plot(points: Sequence[ChartPoint], x_label: str, y_label: str, line_indices: Sequence[int] = ()) -> str:
    """Chart as a standalone SVG. Points without a name are grey; a line joins those of `line_indices`, in order."""
    marks, places = [], []
    extents = {axis: (min(p[axis] for p in points), max(p[axis] for p in points)) for axis in (1, 2)}
    for name, x, y in _scale_points_to_area(points, WIDTH - 2 * EDGE, HEIGHT - 2 * EDGE):
        cx, cy = EDGE + x, HEIGHT - EDGE - y
        places.append(f"{cx:.1f},{cy:.1f}")
        color = "#000" if name else "#bbb"
        marks.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" fill="{color}"/>')
        if name:
            marks.append(f'<text x="{cx + 7:.1f}" y="{cy - 6:.1f}">{escape(name)}</text>')
    if line_indices:
        line = " ".join(places[index] for index in line_indices)
        marks.append(f'<polyline points="{line}" fill="none" stroke="#888" stroke-dasharray="4 3"/>')
    (left, right), (low, high) = extents[1], extents[2]
    bottom = HEIGHT - EDGE + 22
    labels = [
        (EDGE, bottom, "start", f"{left:.4g}"),
        (WIDTH - EDGE, bottom, "end", f"{right:.4g}"),
        (WIDTH / 2, bottom + 18, "middle", x_label),
        (EDGE - 8, HEIGHT - EDGE, "end", f"{low:.4g}"),
        (EDGE - 8, EDGE, "end", f"{high:.4g}"),
        (EDGE, EDGE - 24, "start", y_label),
    ]
    words = [f'<text x="{x:g}" y="{y:g}" text-anchor="{at}">{escape(label)}</text>' for x, y, at, label in labels]
    frame = f'<path d="M{EDGE} {EDGE - 12}V{HEIGHT - EDGE}H{WIDTH - EDGE}" fill="none" stroke="#888"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
    return "\n".join([f'{head}font-size="12">', frame, *marks, *words, "</svg>"])


def _scale_points_to_area(points: Sequence[ChartPoint], width: float, height: float) -> list[ChartPoint]:
    """Values as places from 0 to `width` and to `height`; the middle where all are the same."""

    def scaled(values: Sequence[float], extent: float) -> list[float]:
        least, spread = min(values), max(values) - min(values)
        return [(v - least) / spread * extent if spread else extent / 2 for v in values]

    over = (scaled([p[1] for p in points], width), scaled([p[2] for p in points], height))
    return [(p[0], x, y) for p, x, y in zip(points, *over, strict=True)]

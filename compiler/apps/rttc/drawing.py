"""The curve of a calibration as a picture: accuracy against seconds a query, in SVG and in characters."""

from collections.abc import Callable, Mapping, Sequence
from html import escape

from .policy import Point

_WIDTH, _HEIGHT, _EDGE = 560, 320, 56
_COLUMNS, _ROWS = 60, 16


def pareto_points(points: Sequence[Point]) -> list[Point]:
    """Pareto front: points that no other point beats in both, by rising seconds; one of equals."""
    best, result = -1.0, []
    for point in sorted(points, key=lambda p: (p.seconds, -p.accuracy)):
        if point.accuracy > best:
            best = point.accuracy
            result.append(point)
    return result


def svg_accuracy_chart(
    points: Sequence[Point], highlighted: Mapping[str, Point], background: str = "the dev set"
) -> str:
    """All pairs of thresholds grey, the best ones joined; `highlighted` by name: the branches, and what was chosen."""
    x, y = _axis_scales([*points, *highlighted.values()], (_EDGE, _WIDTH - 120), (_HEIGHT - _EDGE, 24))
    dots = [f'<circle cx="{x(p.seconds):.1f}" cy="{y(p.accuracy):.1f}" r="2.5" fill="#bbb"/>' for p in points]
    line = " ".join(f"{x(p.seconds):.1f},{y(p.accuracy):.1f}" for p in pareto_points(points))
    marks = [
        f'<circle cx="{x(p.seconds):.1f}" cy="{y(p.accuracy):.1f}" r="4.5" fill="#06c"/>'
        f'<text x="{x(p.seconds) + 8:.1f}" y="{y(p.accuracy) + 4:.1f}">{escape(name)} '
        f"{p.accuracy:.2f}, {p.seconds:.2f} s</text>"
        for name, p in highlighted.items()
    ]
    left, top, bottom, right = _EDGE - 12, 16, _HEIGHT - _EDGE + 12, _WIDTH - 100
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>\n'
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#333"/>\n'
        f'<text x="{left}" y="{_HEIGHT - 14}">seconds a query</text>\n'
        f'<text transform="translate(20 {bottom}) rotate(-90)">accuracy on {background}</text>\n'
        f'<polyline points="{line}" fill="none" stroke="#06c" stroke-dasharray="4 3"/>\n'
        + "\n".join([*dots, *marks])
        + "\n</svg>\n"
    )


def text_accuracy_chart(points: Sequence[Point], highlighted: Mapping[str, Point]) -> str:
    """Chart in characters: a dot for each pair of thresholds, a letter for each of `highlighted`, told below."""
    x, y = _axis_scales([*points, *highlighted.values()], (0, _COLUMNS - 1), (_ROWS - 1, 0))
    cells = [[" "] * _COLUMNS for _ in range(_ROWS)]
    for point in points:
        cells[round(y(point.accuracy))][round(x(point.seconds))] = "."
    lines = []
    for letter, (name, point) in zip("abcdefghijklmnop", highlighted.items(), strict=False):
        cells[round(y(point.accuracy))][round(x(point.seconds))] = letter
        lines.append(f"{letter}  {name}: accuracy {point.accuracy:.3f}, {point.seconds:.3f} s a query")
    summary = "\n".join(f"|{''.join(row).rstrip()}" for row in cells)
    return f"accuracy on the dev set\n{summary}\n+{'-' * _COLUMNS} seconds a query\n" + "\n".join(lines) + "\n"


def _axis_scales(
    points: Sequence[Point], x_range: tuple[float, float], y_range: tuple[float, float]
) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """Functions from seconds and accuracy to places."""

    def scale(values: list[float], low: float, high: float) -> Callable[[float], float]:
        least, span = min(values), (max(values) - min(values)) or 1.0
        return lambda value: low + (high - low) * (value - least) / span

    return scale([p.seconds for p in points], *x_range), scale([p.accuracy for p in points], *y_range)

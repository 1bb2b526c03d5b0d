"""The curve of a calibration as a picture: accuracy against seconds a query, in SVG and in characters."""

from collections.abc import Mapping, Sequence

from ...core.front_chart import ascii_scatter_plot, svg_scatter_plot
from .policy import Point


def pareto_indices(points: Sequence[Point]) -> list[int]:
    """Pareto front: indices of points that no other point beats in both, by rising seconds; one of equals."""
    best, result = -1.0, []
    for index in sorted(range(len(points)), key=lambda i: (points[i].seconds, -points[i].accuracy)):
        if points[index].accuracy > best:
            best = points[index].accuracy
            result.append(index)
    return result


def svg_accuracy_chart(
    points: Sequence[Point], highlighted: Mapping[str, Point], background: str = "the dev set"
) -> str:
    """All pairs of thresholds grey, the best ones joined; `highlighted` by name: the branches, and what was chosen."""
    marks = [("", p.seconds, p.accuracy) for p in points]
    marks += [(f"{name} {p.accuracy:.2f}, {p.seconds:.2f} s", p.seconds, p.accuracy) for name, p in highlighted.items()]
    return svg_scatter_plot(marks, "seconds a query", f"accuracy on {background}", pareto_indices(points)) + "\n"


def text_accuracy_chart(points: Sequence[Point], highlighted: Mapping[str, Point]) -> str:
    """Chart in characters: a dot for each pair of thresholds, a letter for each of `highlighted`, listed below."""
    lettered = list(zip("abcdefghijklmnop", highlighted.items(), strict=False))
    marks = [(letter, p.seconds, p.accuracy) for letter, (_, p) in reversed(lettered)]
    plot = ascii_scatter_plot(
        [*marks, *((".", p.seconds, p.accuracy) for p in points)], "seconds a query", "accuracy on the dev set"
    )
    lines = [
        f"{letter}  {name}: accuracy {p.accuracy:.3f}, {p.seconds:.3f} s a query" for letter, (name, p) in lettered
    ]
    return "\n".join([plot, *lines]) + "\n"

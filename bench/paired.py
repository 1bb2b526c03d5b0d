"""Differences between models on equal questions, with paired intervals."""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any

from scipy.stats import t

Z = NormalDist().inv_cdf(0.975)  # half a 95 % interval, in standard errors


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean of independent values, and half of its 95 % interval by Student's t: infinity of one value."""
    if len(values) == 1:
        return values[0], math.inf
    return fmean(values), float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def bits_text(right: Sequence[float]) -> str:
    """Right answers as bits in hexadecimal, the first question's highest."""
    return f"{int(''.join(str(int(r)) for r in right), 2):x}"


def bits_of(text: str, count: int) -> list[int]:
    """Right answers, 0 or 1 a question, of what `bits_text` wrote."""
    return [int(bit) for bit in f"{int(text, 16):0{count}b}"]


def mean_by_question(seeds: Sequence[Sequence[float]]) -> list[float]:
    """Mean over seeds of each question's score."""
    return [fmean(scores) for scores in zip(*seeds, strict=True)]


def paired_difference(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean over questions of a - b, and its standard error; seeds are averaged first.

    a, b  scores [seed][question]. The error is that of questions, for these seeds, and says nothing of others.
    """
    differences = [x - y for x, y in zip(mean_by_question(a), mean_by_question(b), strict=True)]
    return fmean(differences), stdev(differences) / len(differences) ** 0.5


def paired_rows(
    rows: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]
) -> tuple[list[list[int]], list[list[int]]]:
    """Right answers [seed][question] of both, of the seeds that both have; of rows with "seed", "questions" and "right"."""
    both = [
        {r["seed"]: bits_of(r["right"], r["questions"]) for r in group if "right" in r} for group in (rows, baseline)
    ]
    seeds = sorted(both[0].keys() & both[1].keys())
    return [both[0][seed] for seed in seeds], [both[1][seed] for seed in seeds]


def difference_text(rows: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]], in_points: bool = False) -> str:
    """Difference from the baseline with its 95 % interval, "" where no seed has both; `in_points` of a hundredth."""
    pairs = paired_rows(rows, baseline)
    if not pairs[0]:
        return ""
    mean, error = paired_difference(*pairs)
    if in_points:
        return f"{100 * mean:+.2f} ± {100 * Z * error:.2f}"
    return f"{mean:+.3f} ± {Z * error:.3f}"

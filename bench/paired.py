"""Differences between models on equal questions, with paired intervals."""

from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

Z = NormalDist().inv_cdf(0.975)  # half a 95 % interval, in standard errors


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

"""Confidence intervals of a median of few timings, without an assumption about their distribution."""

from collections.abc import Sequence
from math import comb

CONFIDENCE = 0.95
FEWEST = 6  # timings: the range of five holds the median only 15 times in 16


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Bounds that hold the median of what the values are drawn from so often; None where there are too few.

    The k-th smallest and the k-th largest of n independent values hold it but for 2 * P(fewer than k of n coins fall
    heads), whatever the distribution.
    Source: order statistics, David and Nagaraja 2003, "Order Statistics", section 7.1.
    """
    n, ordered = len(values), sorted(values)
    missed, k = 0.0, 0
    while k < n // 2 and 2 * (missed + comb(n, k) / 2**n) <= 1 - confidence:
        missed += comb(n, k) / 2**n
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else None

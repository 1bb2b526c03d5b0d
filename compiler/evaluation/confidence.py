"""Confidence intervals of the median of few timings."""

from collections.abc import Sequence
from math import comb, exp, log
from statistics import fmean, stdev

CONFIDENCE = 0.95
FEWEST = 6  # timings without an assumption: the range of five holds the median only 15 times in 16
STUDENT_99 = {3: 9.925, 4: 5.841, 5: 4.604}  # number of values -> quantile 0.995 of Student's t, n - 1 degrees


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Interval that holds the median of what the values are drawn from so often; None for one or two values.

    Of three to five positive values it is Student's interval of their logarithms at 99 %: wide, since it supposes a
    distribution, so it decides only where a limit is far off. From six on nothing is supposed: the k-th smallest and
    the k-th largest of n independent values hold it but for 2 * P(fewer than k of n coins fall heads).
    Source: order statistics, David and Nagaraja 2003, "Order Statistics", section 7.1.
    """
    n, ordered = len(values), sorted(values)
    if n in STUDENT_99 and ordered[0] > 0:
        logs = [log(value) for value in values]
        half = STUDENT_99[n] * stdev(logs) / n**0.5
        return exp(fmean(logs) - half), exp(fmean(logs) + half)
    missed, k = 0.0, 0
    while k < n // 2 and 2 * (missed + comb(n, k) / 2**n) <= 1 - confidence:
        missed += comb(n, k) / 2**n
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else None

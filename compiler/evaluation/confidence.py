"""Confidence intervals: of the median of few timings, and of the mean over the rows of a data set."""

from collections.abc import Sequence
from math import comb, exp, log, sqrt
from statistics import NormalDist, fmean, stdev

import numpy as np

from ..plugin.row_scores import RowScores

CONFIDENCE = 0.95
FEWEST_ROWS = 8  # without which rows say nothing of others
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


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], quantile: float | None = None
) -> tuple[float, float]:
    """Interval of sum(numerators) / sum(denominators) over rows, which are drawn independently.

    numerators    [n] of each row: nats, right answers, or differences of two models
    denominators  [n] of each row: tokens, questions, or the other model's numerators, for a ratio of two models
    quantile      half its width in standard errors were the ratio normal; 95 % where it is left out
    Rows that all have one ratio give an interval of no width. Asserts at least two rows.
    Source: linearised ratio; Student's t (Abramowitz and Stegun 1964, 26.7.5), corrected for the skewness of rows (Hall
    1992, "On the removal of skewness by transformation", J. R. Statist. Soc. B 54).
    """
    above, below = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    rows = len(above)
    assert rows > 1, f"{rows} rows"
    ratio = float(above.sum() / below.sum())
    residuals = (above - ratio * below) / below.mean()
    variance = float((residuals**2).mean())
    if variance == 0:
        return ratio, ratio
    error = sqrt(variance / (rows - 1))
    skew = float((residuals**3).mean()) / variance**1.5 / sqrt(rows)
    half = student_quantile(normal_quantile((1 + CONFIDENCE) / 2) if quantile is None else quantile, rows - 1)
    return ratio - _without_skew(half, skew) * error, ratio - _without_skew(-half, skew) * error


def metric_interval(scores: RowScores, original_scores: RowScores | None = None) -> tuple[float, float] | None:
    """Interval of a metric, or of its ratio to that of a model with the same rows, at 95 %; None of too few rows.

    Of right and wrong answers each model gets one more right that the other has wrong: rows that all agree have no
    variance, and are no proof (Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data"). Asserts an original that is not 0.
    """
    if len(scores.sums) < FEWEST_ROWS:
        return None
    sums, counts = [*scores.sums], [*scores.counts]
    original_sums = [] if original_scores is None else [*original_scores.sums]
    if scores.form == "share":
        sums, counts, original_sums = [*sums, 1.0, 0.0], [*counts, 1.0, 1.0], [*original_sums, 0.0, 1.0]
    if scores.form == "exp":
        differences = sums if original_scores is None else [a - b for a, b in zip(sums, original_sums, strict=True)]
        low, high = ratio_interval(differences, counts)
        return exp(min(low, 700.0)), exp(min(high, 700.0))
    low, high = ratio_interval(sums, counts if original_scores is None else original_sums)
    low = max(low, 0.0)
    return (low, min(high, 1.0)) if scores.form == "share" and original_scores is None else (low, high)


def normal_quantile(probability: float) -> float:
    return NormalDist().inv_cdf(probability)


def student_quantile(z: float, degrees_of_freedom: int) -> float:
    """Quantile of Student's t where that of the normal distribution is z; 1 % too small at 7 degrees and z = 2.8."""
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / degrees_of_freedom**power for power, term in enumerate(terms, start=1))


def _without_skew(quantile: float, skew: float) -> float:
    """Standard errors at which Hall's transformation of a skewed mean has a quantile; `skew` is over sqrt(rows)."""
    if abs(skew) < 1e-6:
        return quantile
    return 3 / skew * (float(np.cbrt(1 + skew * (quantile - skew / 6))) - 1)

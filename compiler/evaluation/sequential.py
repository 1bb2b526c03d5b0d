"""Paired sequential test: rows of two models are read until a bound on their difference holds or is missed.

The test looks after 24 rows and then after every half more. Its interval at each look is as wide as makes all looks
together miss the mean in at most 1 - `confidence` of all orders of rows, so that to stop at the first clear look costs
no honesty. Widths are equal in standard errors (Pocock 1977, Biometrika 64), which suits differences that are clear
either soon or late; quantiles are Student's, with Hall's correction for skewness (`ratio_interval`).

Chosen by what bench/sequential.py measures on rows of the embedded model: with at most 100 rows it decides a difference
of 0.3 standard deviations 76 times in 100, a confidence sequence by a normal mixture (Waudby-Smith et al. 2021, arXiv
2103.06476), which needs no number of rows, 61 times. Betting (Waudby-Smith and Ramdas 2023, arXiv 2010.09686) is exact
for losses with bounds, which nats do not have.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np

from .confidence import CONFIDENCE, FEWEST_ROWS, normal_quantile, ratio_interval

FIRST = 24  # rows before the first look
GROWTH = 1.5  # of the rows from look to look


@dataclass(frozen=True)
class Verdict:
    """Result of a test after `rows` rows; `low` and `high` are the interval of the mean difference then."""

    outcome: Literal["holds", "missed", "undecided"]
    rows: int
    low: float
    high: float


class PairedBound:
    """Test of "the mean difference is at most `limit`", row by row.

    rows        rows that there are; all of them at most are read
    confidence  share of row orders, at least, in which no verdict is wrong. Of several candidates that one search
                tests, each takes 1 - (1 - confidence) / candidates
    extremes    smallest and largest difference of a row where scores are 0 or 1 (right or wrong): a row of each is
                added, since rows that all agree have no variance and are no proof (Bonett and Price 2012, "Adjusted
                Wald confidence interval for a difference of binomial proportions based on paired data")

    Rows are given in random order (`row_order`). Losses in nats: differences of the sums of each row, weights its
    tokens, `limit` log(factor). Other scores: candidate - factor * original, `limit` 0; negated for "at least".
    """

    def __init__(
        self, rows: int, limit: float = 0.0, confidence: float = CONFIDENCE, extremes: tuple[float, float] | None = None
    ):
        self.rows, self.limit, self.extremes = rows, limit, extremes
        self.looks = look_sizes(rows)
        self.quantile = pocock_critical_value(self.looks, 1 - confidence) if self.looks else math.inf
        self.verdict: Verdict | None = None
        self._sums: list[float] = []
        self._counts: list[float] = []
        self._interval: tuple[float, float] | None = None

    @property
    def next_rows(self) -> int:
        """Rows that are missing to the next look; 0 where the test has ended."""
        if self.verdict is not None:
            return 0
        read = len(self._sums)
        return next((size for size in self.looks if size > read), self.rows) - read

    def add(self, differences: Sequence[float], weights: Sequence[float] | None = None) -> Verdict | None:
        """Read further rows; the verdict once there is one, which later rows do not change.

        differences  [n] sums over each row: of a row with many tokens the difference of their total loss
        weights      [n] tokens of each row; 1 each where they are left out
        """
        weights = [1.0] * len(differences) if weights is None else weights
        for difference, weight in zip(differences, weights, strict=True):
            if self.verdict is not None:
                break
            self._sums.append(float(difference))
            self._counts.append(float(weight))
            self._look()
        return self.verdict

    def interval(self) -> tuple[float, float] | None:
        """Interval of the mean difference at the latest look; None before the first one."""
        return self._interval

    def _look(self) -> None:
        read = len(self._sums)
        assert read <= self.rows, f"row {read} of {self.rows}"
        if read in self.looks:
            sums, counts = [*self._sums], [*self._counts]
            if self.extremes is not None:
                sums, counts = [*sums, *self.extremes], [*counts, 1.0, 1.0]
            self._interval = low, high = ratio_interval(sums, counts, self.quantile)
            if high <= self.limit:
                self.verdict = Verdict("holds", read, low, high)
            elif low > self.limit:
                self.verdict = Verdict("missed", read, low, high)
        if self.verdict is None and read == self.rows:
            self.verdict = Verdict("undecided", read, *(self._interval or (-math.inf, math.inf)))


def row_order(n_rows: int, seed: int) -> list[int]:
    """Random order in which a test reads rows, by a seed."""
    return np.random.default_rng(seed).permutation(n_rows).tolist()


def look_sizes(n_rows: int) -> tuple[int, ...]:
    """Numbers of rows after which a test looks, `n_rows` the last; none where there are too few."""
    if n_rows < FEWEST_ROWS:
        return ()
    sizes, size = [], float(FIRST)
    while size < n_rows:
        sizes.append(math.ceil(size))
        size *= GROWTH
    return (*sizes, n_rows)


@lru_cache
def pocock_critical_value(looks: tuple[int, ...], alpha: float) -> float:
    """Standard errors that the mean of growing samples leaves at any look with probability `alpha`.

    By recursive integration of the density of what has not left yet (Armitage, McPherson and Rowe 1969).
    """
    low, high = (normal_quantile(1 - alpha / 2 / tests) for tests in (1, len(looks)))  # one look; independent ones
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if _crossing_probability(looks, middle) > alpha else (low, middle)
    return high


def _crossing_probability(looks: tuple[int, ...], bound: float) -> float:
    """Probability that a standardised mean is beyond `bound` at one of the looks, by the trapezoidal rule."""
    grid = np.linspace(-bound, bound, 161)
    steps = np.full(len(grid), grid[1] - grid[0])
    steps[[0, -1]] /= 2
    density = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
    for earlier, later in pairwise(looks):
        correlation = math.sqrt(earlier / later)
        deviation = math.sqrt(1 - earlier / later)
        distances = (grid[:, None] - correlation * grid) / deviation
        density = np.exp(-(distances**2) / 2) @ (density * steps) / (deviation * math.sqrt(2 * math.pi))
    return 1 - float(density @ steps)

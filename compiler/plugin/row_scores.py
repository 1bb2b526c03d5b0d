"""Scores of single rows, of which a metric is the mean."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RowScores:
    """Scores of rows that are independent of each other, in the order of the data set.

    sums    [n] of each row: nats, right answers, reciprocal ranks
    counts  [n] what each sum is over: tokens, questions
    form    "mean": the metric is the mean; "exp": exp of it; "share": every sum is 0 or 1, and the metric their share
    noun    of a row in sentences
    """

    sums: Sequence[float]
    counts: Sequence[float]
    form: Literal["mean", "exp", "share"] = "mean"
    noun: str = "row"

    @property
    def value(self) -> float:
        mean = math.fsum(self.sums) / math.fsum(self.counts)
        if self.form != "exp":
            return mean
        return math.exp(mean) if mean < 709 else math.inf  # exp of more is no float64

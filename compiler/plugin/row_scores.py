"""Scores of single rows, of which a metric is the mean."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


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


def sums_and_counts(scores: "Tensor", row_length: int, text_lengths: "Tensor | None") -> tuple[list[float], list[int]]:
    """Sum of the scores of each row, and how many it has: where a row has one for each token, none of its padding.

    scores         [n, p] float64
    row_length     tokens of a row with its padding; p is that, or rows are judged as a whole
    text_lengths   [n] int64 tokens in front of the padding; None where there is none
    """
    import torch

    num_rows, num_scores = scores.shape
    if text_lengths is None or num_scores != row_length:
        return scores.sum(1).tolist(), [num_scores] * num_rows
    is_text = torch.arange(num_scores) < text_lengths[:, None]
    return torch.where(is_text, scores, 0.0).sum(1).tolist(), text_lengths.tolist()

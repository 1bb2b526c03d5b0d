"""Effects of single changes added up: what a combination that was not measured is predicted to be.

Perplexities, times and bytes multiply, so their logarithms add; accuracies and divergences add as they are. What
combinations that were measured differ from their sum is taken off the others, as far as they share changes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .alternatives import Candidate
from .trials import Trial


@dataclass(frozen=True)
class Effects:
    """Predictions from trials by candidate; the unchanged candidate is among them.

    adds   metrics whose differences add: those of which more is better, or of which the original has 0
    """

    trials: Mapping[Candidate, Trial]
    unchanged: Candidate
    adds: frozenset[str]

    def predict(self, candidate: Candidate, metric: str) -> float | None:
        """Value of a metric for a combination; None where a single change was not measured."""
        total = self._sum_of_single_effects(candidate, metric)
        if total is None:
            return None
        total += self._mean_prediction_error(candidate, metric)
        original = self.trials[self.unchanged].values[metric][1]
        return original + total if metric in self.adds else original * math.exp(total)

    def _sum_of_single_effects(self, candidate: Candidate, metric: str) -> float | None:
        singles = self._single_change_candidates(candidate)
        if any(s not in self.trials or self.trials[s].refused for s in singles):
            return None
        base = self._log_ratio_or_difference(self.unchanged, metric)
        return base + sum(self._log_ratio_or_difference(s, metric) - base for s in singles)

    def _single_change_candidates(self, candidate: Candidate) -> list[Candidate]:
        """Candidates with one change of this one each."""
        base = self.unchanged.axes
        return [
            Candidate(*(a if i == axis else b for i, b in enumerate(base)))
            for axis, a in enumerate(candidate.axes)
            if a != base[axis]
        ]

    def _log_ratio_or_difference(self, candidate: Candidate, metric: str) -> float:
        value, original = self.trials[candidate].values[metric]
        if metric in self.adds:
            return value - original
        return math.log(max(value, 1e-12) / max(original, 1e-12))

    def _mean_prediction_error(self, candidate: Candidate, metric: str) -> float:
        """Mean error of the sums of measured combinations, weighed by how many changes they share."""
        total = weights = 0.0
        for other, trial in self.trials.items():
            if other.changes < 2 or trial.refused or other == candidate:
                continue
            shared = sum(a == b for a, b in zip(other.axes, candidate.axes, strict=True))
            total_of_other = self._sum_of_single_effects(other, metric)
            if total_of_other is not None and shared >= 2:
                total += (shared - 1) * (self._log_ratio_or_difference(other, metric) - total_of_other)
                weights += shared - 1
        return total / weights if weights else 0.0

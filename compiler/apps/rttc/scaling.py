"""Calibration of rewards: the chance that an answer with some reward is right, learned for each branch from a dev set.

A reward ranks answers of one way to make them; between ways it need not. A model's own likelihood prefers the long
sentence that it says by itself to the one word that samples taught it, however often the word is right: whichever way
answers best, the largest reward would never be its. So the log-odds of a right answer are a line in the reward for each
branch. The lines share a slope and depart from it as far as the dev questions ask for: dozens are few.
"""

from collections.abc import Sequence

import torch

from .logistic import fit_logistic_regression
from .policy import BRANCHES, PlattScaling, Policy, Trial, measure

_PENALTY = 0.003  # on departures and slopes: a branch with ten answers keeps near the others


def fit_platt_scaling(trials: Sequence[Trial]) -> PlattScaling:
    """Fit a logistic slope and bias for each branch to the trials.

    Source: scores to chances by a logistic function, Platt 1999; several groups that share one, as in a mixed model.
    """
    rewards = torch.tensor([[trial.rewards[b] for b in BRANCHES] for trial in trials])  # [n, branches]
    right = torch.tensor([[float(trial.right[b]) for b in BRANCHES] for trial in trials])
    mean, spread = rewards.mean(), rewards.std().clamp(min=1e-6)
    branch_one_hot = torch.eye(len(BRANCHES)).repeat(len(trials), 1)  # [n * branches, branches]
    z = ((rewards - mean) / spread).flatten()[:, None]
    weight, bias = fit_logistic_regression(
        torch.cat([z, z * branch_one_hot, branch_one_hot], dim=1), right.flatten(), _PENALTY
    )
    shared, departures, shifts = weight[0], *weight[1:].chunk(2)
    slopes = (shared + departures) / spread
    biases = bias + shifts - slopes * mean
    return {b: (float(slope), float(at)) for b, slope, at in zip(BRANCHES, slopes, biases, strict=True)}


def scaling_improves_accuracy(trials: Sequence[Trial], scales: PlattScaling) -> bool:
    """Whether the best of all three answers is more often right by chances than by rewards as they are."""
    plain = Policy("best")
    return measure(trials, Policy("best", scales=scales)).accuracy > measure(trials, plain).accuracy

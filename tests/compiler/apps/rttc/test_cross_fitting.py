"""A policy is judged by questions that did not choose its thresholds."""

import random

import pytest
import torch
from effc.compiler.apps.rttc.calibration import cross_fitted_point, cross_fitted_router_point, fit_policy
from effc.compiler.apps.rttc.cross_fitting import FOLDS, cross_fitting_folds
from effc.compiler.apps.rttc.policy import BRANCHES, Policy, Trial, measure
from effc.compiler.apps.rttc.router import features, measure_router, train_router
from effc.compiler.apps.rttc.signals import Signals
from hypothesis import given
from hypothesis import strategies as st

SECONDS = dict(zip(BRANCHES, (1.0, 2.0, 8.0), strict=True))


def coin_trials(count, seed, tells=False):
    """Answers that are right by a coin; rewards say which (`tells`), or nothing."""
    draw = random.Random(seed)
    result = []
    for _ in range(count):
        right = {branch: draw.random() < 0.5 for branch in BRANCHES}
        result.append(Trial({b: (right[b] if tells else 0) + draw.random() / 2 for b in BRANCHES}, right, SECONDS))
    return result


@given(count=st.integers(1, 40), seed=st.integers(0, 99))
def test_each_row_is_held_out_once_from_a_fit_on_all_others(count, seed):
    parts = list(cross_fitting_folds(count, seed))
    assert len(parts) <= FOLDS and sorted(row for _, held_out in parts for row in held_out) == list(range(count))
    assert all(sorted(training + held_out) == list(range(count)) for training, held_out in parts)


@pytest.mark.slow
def test_thresholds_that_fit_noise_are_not_praised_for_it():
    praised, held_out = [], []
    for seed in range(10):
        trials = coin_trials(30, seed)
        policy = fit_policy(trials, Policy(), 0.0)[0]
        point = cross_fitted_point(trials, policy, 0.0, seed)
        praised.append(measure(trials, policy).accuracy)
        held_out.append(point.accuracy)
        assert (point.direct, point.rag) == (policy.direct, policy.rag)  # those of all questions are what is used
    assert sum(praised) / 10 > 0.6
    assert sum(held_out) / 10 == pytest.approx(0.5, abs=0.06)  # two standard errors of 300 coins


def test_thresholds_of_a_reward_that_tells_right_from_wrong_hold_for_questions_held_out():
    trials = coin_trials(60, 0, tells=True)
    policy = fit_policy(trials, Policy(), 0.0)[0]
    best = sum(any(trial.right.values()) for trial in trials) / len(trials)
    assert cross_fitted_point(trials, policy, 0.0, 0).accuracy == pytest.approx(best)


@pytest.mark.parametrize("kind", BRANCHES)
def test_a_fixed_branch_is_the_same_held_out_and_so_is_a_single_question(kind):
    trials = coin_trials(11, 3)
    assert cross_fitted_point(trials, Policy(kind), 0.0, 0) == measure(trials, Policy(kind))
    assert cross_fitted_point(trials[:1], Policy(), 0.0, 0) == measure(trials[:1], Policy())


@pytest.mark.slow
def test_a_router_that_learned_noise_by_heart_is_not_praised_for_it():
    trials, draw = coin_trials(20, 5), torch.Generator().manual_seed(5)
    seen = torch.stack([features(torch.randn(16, generator=draw), Signals(0.0, 0.0)) for _ in trials])
    router = train_router(trials, seen, 0.0, force=True)
    point = cross_fitted_router_point(router, trials, seen, 0.0, 0)
    assert measure_router(router, trials, seen).accuracy > 0.8 and point.accuracy < 0.6

"""The paired sequential test: seldom wrong, early where the truth is clear, and open where rows say too little."""

import numpy as np
import pytest
import torch
from effc.compiler.evaluation.confidence import ratio_interval
from effc.compiler.evaluation.sequential import PairedBound, look_sizes, pocock_critical_value, row_order

from bench import sequential

RESAMPLES, ROWS = 400, 400


@pytest.fixture(scope="module")
def pools():
    """Differences of rows of 12 tokens of the embedded model in int4: nats a token, and the divergence."""
    model, original, rows = (
        sequential.with_rounded_weights(sequential.load()),
        sequential.load(),
        sequential.token_windows(12)[:1200],
    )
    torch.set_num_threads(1)
    return dict(
        zip(("nats", "divergence"), sequential.nats_and_divergence_differences(model, original, rows), strict=True)
    )


@pytest.mark.parametrize("name", ["nats", "divergence"])
@pytest.mark.slow
def test_a_limit_at_the_truth_is_called_held_or_missed_in_at_most_one_of_twenty_resamples(pools, name):
    outcomes = [
        o for o, _ in sequential.resampled_outcomes(pools[name], 0.0, ROWS, RESAMPLES, np.random.default_rng(0))
    ]
    assert outcomes.count("holds") <= 0.05 * RESAMPLES and outcomes.count("missed") <= 0.05 * RESAMPLES


@pytest.mark.parametrize(("distance", "outcome"), [(0.5, "holds"), (-0.5, "missed")])
def test_a_clear_truth_takes_a_third_of_the_rows_of_a_fixed_test_of_the_power_for_close_ones(pools, distance, outcome):
    rng = np.random.default_rng(1)
    close = [o for o, _ in sequential.resampled_outcomes(pools["nats"], 0.2, ROWS, 100, rng)]
    fixed = sequential.fixed_rows(0.2, close.count("holds") / 100)
    clear = sequential.resampled_outcomes(pools["nats"], distance, ROWS, 100, rng)
    assert close.count("holds") >= 80 and all(o == outcome for o, _ in clear)
    assert 3 * np.mean([rows for _, rows in clear]) < fixed


def test_rows_that_all_agree_are_no_proof_of_right_answers():
    agreeing = [0.97 - 1.0] * 500  # both models are right, and the candidate may lose 3 % of that
    blind, careful = PairedBound(500), PairedBound(500, extremes=(-1.0, 0.97))
    assert blind.add(agreeing).rows == 24
    assert careful.add(agreeing).outcome == "holds" and careful.verdict.rows > 100  # 3 / 0.03, the rule of three


@pytest.mark.parametrize("share", [0.02, 0.1])
def test_lost_answers_are_called_a_kept_bound_in_at_most_one_of_twenty_resamples(share):
    rng, wrong = np.random.default_rng(2), 0
    for _ in range(RESAMPLES):
        lost = rng.random(ROWS) < share  # the original is right everywhere, and the limit is what is lost
        wrong += PairedBound(ROWS, extremes=(-1.0, 1 - share)).add(lost - share).outcome == "holds"
    assert wrong <= 0.05 * RESAMPLES


def test_a_few_rows_decide_nothing():
    assert PairedBound(7).add([-1.0] * 7).outcome == "undecided"
    assert look_sizes(7) == () and look_sizes(12) == (12,) and look_sizes(60) == (24, 36, 54, 60)


def test_rows_come_one_by_one_or_together_and_later_ones_change_nothing():
    rows = np.random.default_rng(3).normal(-0.5, 1.0, 200)
    together, single = PairedBound(200), PairedBound(200)
    while single.next_rows:
        single.add([rows[len(single._sums)]])
    assert together.add(rows) == single.verdict and together.verdict.rows < 200 and together.next_rows == 0
    assert together.add([100.0]) == single.verdict
    assert together.interval() == (single.verdict.low, single.verdict.high)


def test_a_row_counts_as_often_as_it_has_tokens():
    rng = np.random.default_rng(4)
    tokens = rng.integers(1, 50, 100)
    sums = rng.normal(0.1, 1.0, 100) * tokens
    low, high = ratio_interval(sums, tokens)
    assert low < sums.sum() / tokens.sum() < high and not low < sums.mean() < high


def test_an_interval_of_95_percent_misses_the_mean_of_skewed_rows_one_time_in_twenty():
    rng, missed = np.random.default_rng(5), 0
    for _ in range(1000):
        low, high = ratio_interval(rng.exponential(size=40), [1.0] * 40)
        missed += not low <= 1.0 <= high
    assert 0.03 <= missed / 1000 <= 0.08  # by Student's alone 0.08 to 0.1


def test_one_look_takes_the_quantile_of_one_test():
    assert pocock_critical_value((100,), 0.05) == pytest.approx(1.96, abs=1e-3)
    assert pocock_critical_value((10, 20), 0.05) == pytest.approx(2.178, abs=2e-3)  # Pocock 1977, table 1


def test_an_order_holds_every_row_once_and_follows_from_its_seed():
    assert sorted(row_order(50, 1)) == list(range(50)) and row_order(50, 1) == row_order(50, 1) != row_order(50, 2)

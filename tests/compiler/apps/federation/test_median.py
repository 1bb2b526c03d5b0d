"""The geometric median and All-But-Me: what the numbers must come to."""

import numpy as np
import pytest
from effc.compiler.apps.federation.all_but_me import leave_one_out_shares
from effc.compiler.apps.federation.median import centered_gram
from effc.compiler.apps.federation.mixing import best_mix, mix
from effc.compiler.apps.federation.state import mean, weighted_sum
from hypothesis import given
from hypothesis import strategies as st

from tests.compiler.apps.federation.states import geometric_median


def states(points):
    return {k: {"x": np.array(p, dtype=np.float64)} for k, p in enumerate(points)}


def ones(points):
    return dict.fromkeys(range(len(points)), 1.0)


def median(points, weights=None):
    found = states(points)
    return geometric_median(found, weights or ones(points))["x"]


def others(points, weights=None, median=False):
    """What every client gets."""
    found = states(points)
    shares = leave_one_out_shares(weights or ones(points), centered_gram(found) if median else None)
    return {k: weighted_sum(found, row)["x"] if row else found[k]["x"] for k, row in shares.items()}


def test_the_median_of_a_triangle_is_its_fermat_point():
    assert median([(0, 0), (4, 0), (0, 3)]) == pytest.approx((0.6958, 0.7512), abs=1e-4)


def test_an_outlier_does_not_move_the_median():
    assert median([(1, 1), (1.2, 0.9), (100, 100)]) == pytest.approx((1.186, 0.950), abs=1e-3)
    assert mean(states([(1, 1), (1.2, 0.9), (100, 100)]), ones(range(3)))["x"] == pytest.approx(
        (34.07, 33.97), abs=0.01
    )


def test_an_outlier_a_million_away_costs_no_digits():
    near = median([(1, 1), (1.2, 0.9), (0.9, 1.3), (1e6, 1e6), (1, 1.1)])
    far = median([(1, 1), (1.2, 0.9), (0.9, 1.3), (1e9, 1e9), (1, 1.1)])
    assert near == pytest.approx(far, abs=1e-5)
    assert np.linalg.norm(near - (1.05, 1.05)) < 0.2


@pytest.mark.parametrize(
    "points",
    [
        [(0, 0), (1, 1), (2, 2), (5, 5)],
        [(1, 2)] * 4,
        [(0, 0), (1, 0)],
        [(3, 4)],
        [(0, 0), (0, 0), (1, 1)],
        [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (0, 0)],
    ],
)
def test_collinear_coincident_and_few_points_have_a_median(points):
    assert np.isfinite(median(points)).all()


def test_the_median_of_points_on_a_line_is_the_middle_one():
    assert median([(0, 0), (1, 1), (9, 9)]) == pytest.approx((1, 1), abs=1e-6)


def test_the_heavier_of_two_points_is_their_median():
    assert median([(0, 0), (1, 0)], {0: 3.0, 1: 1.0}) == pytest.approx((0, 0), abs=1e-6)


@given(st.lists(st.tuples(*[st.floats(-5, 5)] * 3), min_size=3, max_size=7), st.integers(0, 9))
def test_no_point_nearby_has_a_smaller_sum_of_distances(points, seed):
    def cost(at):
        return sum(np.linalg.norm(np.array(p) - at) for p in points)

    found = median(points)
    steps = np.random.default_rng(seed).standard_normal((20, 3))
    assert all(cost(found) <= cost(found + size * step) + 1e-6 for step in steps for size in (1e-3, 0.1, 1.0))


def test_two_clients_meet_in_the_middle_swap_or_stay():
    for way in (False, True):
        down = others([(0, 0), (2, 4)], median=way)
        own = states([(0, 0), (2, 4)])
        for share, want in ((0.5, [(1, 2), (1, 2)]), (1.0, [(2, 4), (0, 0)]), (0.0, [(0, 0), (2, 4)])):
            mixed = [mix(own[k], {"x": down[k]}, share)["x"] for k in own]
            np.testing.assert_allclose(mixed, want)


def test_mixing_with_the_mean_of_the_others_keeps_the_mean_and_shrinks_differences():
    points = np.random.default_rng(0).standard_normal((4, 6))
    down, own = others(points), states(points)
    mixed = np.stack([mix(own[k], {"x": down[k]}, 0.5)["x"] for k in own])
    np.testing.assert_allclose(mixed.mean(0), points.mean(0))
    np.testing.assert_allclose(mixed - mixed.mean(0), (points - points.mean(0)) / 3)  # |1 - l - l / (K - 1)|
    fully = np.stack([mix(own[k], {"x": down[k]}, 3 / 4)["x"] for k in own])  # (K - 1) / K is FedAvg
    np.testing.assert_allclose(fully, np.broadcast_to(points.mean(0), fully.shape), atol=1e-12)


def test_the_median_of_the_others_does_not_keep_the_mean():
    points = np.array([(1, 1), (1.2, 0.9), (0.8, 1.1), (100, 100)])
    down, own = others(points, median=True), states(points)
    mixed = np.stack([mix(own[k], {"x": down[k]}, 0.5)["x"] for k in own])
    assert np.linalg.norm(mixed.mean(0) - points.mean(0)) > 5
    assert np.linalg.norm(down[0] - (1, 1)) < 1  # the outlier is not in it


def test_a_client_alone_has_no_others():
    assert leave_one_out_shares({3: 2.0}) == {3: {}}


def test_a_client_without_examples_has_no_part_in_what_others_get():
    assert leave_one_out_shares({0: 1.0, 1: 0.0, 2: 1.0})[0] == {2: 1.0}


def test_the_order_of_clients_changes_no_bit():
    points = np.random.default_rng(1).standard_normal((5, 4))
    found = states(points)
    turned = dict(reversed(found.items()))
    for weights in (ones(points), {k: k + 1.0 for k in range(5)}):
        assert (mean(found, weights)["x"] == mean(turned, weights)["x"]).all()
        assert (geometric_median(found, weights)["x"] == geometric_median(turned, weights)["x"]).all()


def test_an_adaptive_share_is_never_worse_than_staying_alone():
    own, other = {"x": np.array([1.0, 0.0])}, {"x": np.array([0.0, 4.0])}
    for goal in ((1.0, 0.0), (0.5, 2.0), (0.0, 4.0), (5.0, -3.0)):

        def loss(state, goal=goal):
            return float(((state["x"] - goal) ** 2).sum())

        share, state = best_mix(own, other, loss)
        assert loss(state) <= loss(own)
        assert share == {(1.0, 0.0): 0.0, (0.5, 2.0): 0.5, (0.0, 4.0): 1.0, (5.0, -3.0): 0.0}[goal]

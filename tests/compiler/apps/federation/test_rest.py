"""What all clients but one come to: equal to summing them, whoever is left out, and linear in their number."""

import numpy as np
import pytest
from effc.compiler.apps.federation import leave_one_out, personal
from effc.compiler.apps.federation.leave_one_out import LeaveOneOut
from effc.compiler.apps.federation.median import geometric_median_weights
from effc.compiler.apps.federation.personal import AllButMe
from effc.compiler.apps.federation.rotations import (
    nearest_orthonormal_rows,
    weighted_intervention_mean,
    with_orthonormal_rotations,
)
from effc.compiler.apps.federation.state import flat_float64, normalized_weights, shapes, weighted_sum
from effc.compiler.apps.federation.strategy import TrainedState
from hypothesis import given
from hypothesis import strategies as st

from tests.compiler.apps.federation.states import geometric_median


def clients(count, seed=0, spread=1.0, rank=2, width=6):
    draw = np.random.default_rng(seed)

    def one():
        made = {
            "e.R": nearest_orthonormal_rows(draw.standard_normal((rank, width))),
            "e.W": draw.standard_normal((rank, width)),
        }
        made |= {"e.b": draw.standard_normal(rank), "head": draw.standard_normal((2, width))}
        return {name: (array * (1 if name == "e.R" else spread)).astype(np.float32) for name, array in made.items()}

    return {k: one() for k in range(count)}, {k: float(draw.integers(0, 9)) for k in range(count)}


def edit(state):
    """The function of an intervention, whatever its basis: R' [W - R | b]."""
    return state["e.R"].T @ np.hstack([state["e.W"] - state["e.R"], state["e.b"][:, None]])


@given(count=st.integers(2, 7), seed=st.integers(0, 99))
def test_the_mean_of_the_others_is_their_sum_over_their_weights(count, seed):
    states, weights = clients(count, seed)
    made = LeaveOneOut(states, weights, "project")
    for client in states:
        others = {k: w for k, w in weights.items() if k != client and w > 0}
        found = made.mean_for(client, states[client])
        if not others:
            assert found == {}
            continue
        wanted = with_orthonormal_rotations(weighted_sum(states, normalized_weights(others)))
        for name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], atol=2e-5)


@pytest.mark.parametrize("far", [1e7, 1e12, 1e30])
def test_an_outlier_that_leaves_itself_out_loses_no_digit_of_the_others(far):
    states, weights = clients(5)
    weights = dict.fromkeys(weights, 1.0)
    states[4] = {n: a if n == "e.R" else (a * far).astype(np.float32) for n, a in states[4].items()}
    found = LeaveOneOut(states, weights, "project").mean_for(4, states[4])
    wanted = with_orthonormal_rotations(weighted_sum(states, dict.fromkeys(range(4), 0.25)))
    for name in ("e.W", "e.b", "head"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6)


def test_a_client_that_outweighs_all_others_gets_their_mean():
    states, _ = clients(4)
    found = LeaveOneOut(states, {0: 1e18, 1: 1.0, 2: 1.0, 3: 2.0}, "project").mean_for(0, states[0])
    wanted = with_orthonormal_rotations(weighted_sum(states, {1: 0.25, 2: 0.25, 3: 0.5}))
    np.testing.assert_allclose(found["head"], wanted["head"], rtol=1e-5)


@pytest.mark.slow
@given(seed=st.integers(0, 99))
def test_clients_that_learned_the_same_in_rotated_bases_get_it_back_in_their_own(seed):
    states, _ = clients(1, seed)
    draw, turned = np.random.default_rng(seed), {}
    for k in range(5):
        turn = nearest_orthonormal_rows(draw.standard_normal((2, 2)))
        turned[k] = {n: (turn @ a).astype(np.float32) if n.startswith("e.") else a for n, a in states[0].items()}
    made = LeaveOneOut(turned, dict.fromkeys(turned, 1.0), "align")
    for k, own in turned.items():
        for name in own:
            np.testing.assert_allclose(made.mean_for(k, own)[name], own[name], atol=1e-5)


def test_the_common_frame_gives_nearly_what_aligning_with_each_receiver_does():
    start, _ = clients(1)
    states, _ = clients(6, 3)
    near = {
        k: with_orthonormal_rotations({n: (start[0][n] + 0.05 * a).astype(np.float32) for n, a in s.items()})
        for k, s in states.items()
    }
    found = LeaveOneOut(near, dict.fromkeys(near, 1.0), "align").mean_for(2, near[2])
    wanted = weighted_intervention_mean(near, {k: 0.2 for k in near if k != 2}, near[2], "align")
    assert np.abs(edit(found) - edit(wanted)).max() < 2e-3 < np.abs(edit(wanted)).max() / 100


def test_one_median_of_many_gives_each_nearly_the_median_of_its_others_and_no_outlier(monkeypatch):
    states, _ = clients(40, 1)
    near = {k: {n: (0.1 * a).astype(np.float32) for n, a in s.items() if n == "head"} for k, s in states.items()}
    near |= {k: {"head": near[k]["head"] + np.float32(1e4)} for k in range(4)}
    made = {}
    for many in (64, 8):
        monkeypatch.setattr(personal, "MANY", many)
        strategy = AllButMe(shapes(near[0]), "median", "project", 0.5)
        strategy.begin(near[9])
        strategy.aggregate(1, {k: TrainedState(s, 1.0) for k, s in near.items()})
        made[many] = {k: strategy.payload(k, 2, 1).arrays["others"]["head"] for k in near}
    for k in near:
        assert np.abs(made[64][k] - made[8][k]).max() < 0.01
        assert np.abs(made[8][k]).max() < 0.2


def test_the_pull_of_a_median_is_that_of_the_median():
    states, weights = clients(30, 2)
    weights = {k: w + 1 for k, w in weights.items()}
    pull = geometric_median_weights(states, weights)
    found = weighted_sum(states, pull)
    np.testing.assert_allclose(flat_float64(found), flat_float64(geometric_median(states, weights)), atol=1e-4)
    same = dict.fromkeys(range(3), states[0])
    assert geometric_median_weights(same, dict.fromkeys(same, 1.0)) == pytest.approx(dict.fromkeys(same, 1 / 3))


def test_a_round_looks_at_every_state_a_few_times_however_many_clients_there_are(monkeypatch):
    looks = []
    turned = LeaveOneOut._aligned_float64
    monkeypatch.setattr(LeaveOneOut, "_aligned_float64", lambda self, state: looks.append(1) or turned(self, state))
    for count in (10, 40):
        looks.clear()
        states, _ = clients(count)
        strategy = AllButMe(shapes(states[0]), "mean", "align", 0.5)
        strategy.begin(states[0])
        strategy.aggregate(1, {k: TrainedState(s, 3.0) for k, s in states.items()})
        for k in states:
            strategy.payload(k, 2, 1)
        assert len(looks) == 2 * count
    assert leave_one_out.MAX_WEIGHT < 2**52

"""Masked sums, clipping and noise."""

import numpy as np
import pytest
from effc.compiler.apps.federation.masks import Keys, from_fixed_point, mean_of_others, to_fixed_point
from effc.compiler.apps.federation.noise import client_epsilon, clip_update_norm, noisy_mean
from effc.compiler.apps.federation.state import flat_float64, mean, shapes
from effc.dsl.syntax.diagnostics import Reject


def states(count):
    draw = np.random.default_rng(0)
    return {
        k: {"R": draw.standard_normal((4, 8)).astype(np.float32), "b": draw.standard_normal(4).astype(np.float32)}
        for k in range(count)
    }


def masked(clients, number, keys):
    publics = {k: key.public for k, key in keys.items()}
    return {
        k: to_fixed_point(s, len(clients)) + keys[k].mask_for_client(k, publics, number, flat_float64(s).size)
        for k, s in clients.items()
    }


def test_masks_cancel_in_the_sum_and_every_client_gets_the_mean_of_the_others():
    pytest.importorskip("cryptography")
    clients = states(4)
    sent = masked(clients, 1, {k: Keys() for k in clients})
    total = from_fixed_point(sum(sent.values()), shapes(clients[0]))
    for k, own in clients.items():
        want = mean({j: s for j, s in clients.items() if j != k}, dict.fromkeys(clients.keys() - {k}, 1.0))
        got = mean_of_others(total, own, len(clients))
        for name in own:
            np.testing.assert_allclose(got[name], want[name], atol=4 * 2**-16)


def test_what_one_client_sends_tells_nothing_and_differs_from_round_to_round():
    pytest.importorskip("cryptography")
    clients = {k: {"x": np.zeros(4096, np.float32)} for k in range(3)}
    keys = {k: Keys() for k in clients}
    one, two = masked(clients, 1, keys)[0], masked(clients, 2, keys)[0]
    assert (one != two).mean() > 0.99
    assert abs(one.astype(np.float64).mean() / 2**32 - 0.5) < 0.03  # the mask alone, spread evenly
    assert len(np.unique(one)) > 4000


def test_a_state_that_a_sum_could_not_hold_is_refused():
    with pytest.raises(Reject) as refused:
        to_fixed_point({"x": np.array([9000.0])}, 4)
    assert refused.value.diagnostics[0].slug == "mask-range"


def test_a_change_is_shortened_and_a_small_one_stays():
    before = {"x": np.zeros(3), "y": np.zeros(1)}
    state = {"x": np.array([3.0, 0, 0]), "y": np.array([4.0])}
    assert np.linalg.norm(flat_float64(clip_update_norm(state, before, 1.0))) == pytest.approx(1.0)
    assert (clip_update_norm(state, before, 10.0)["x"] == state["x"]).all()
    assert (clip_update_norm(before, before, 1.0)["x"] == 0).all()


def test_one_client_moves_the_mean_by_no_more_than_its_share_of_the_norm():
    before = {"x": np.zeros(5)}
    near = {k: {"x": np.full(5, 0.1)} for k in range(4)}
    far = near | {0: {"x": np.full(5, 1e6)}}
    one, two = (noisy_mean(some, before, 1.0, 0.0)["x"] for some in (near, far))
    assert np.linalg.norm(one - two) <= 2 * 1.0 / 4


def test_noise_has_the_stated_deviation():
    before = {"x": np.zeros(200_000)}
    made = noisy_mean(dict.fromkeys(range(5), before), before, 2.0, 1.5, seed=0)["x"]
    assert made.std() == pytest.approx(1.5 * 2.0 / 5, rel=0.01)
    assert (noisy_mean({0: before}, before, 1.0, 1.0)["x"] != noisy_mean({0: before}, before, 1.0, 1.0)["x"]).any()


def test_epsilon_grows_with_rounds_and_falls_with_noise():
    assert client_epsilon(10, 1.0, 1e-5) > client_epsilon(5, 1.0, 1e-5) > client_epsilon(5, 2.0, 1e-5)
    assert client_epsilon(1, 0.0, 1e-5) == float("inf")


def test_what_was_spent_is_told_in_a_sentence():
    from effc.compiler.apps.federation.history import ClientUpdate, Round
    from effc.compiler.apps.federation.noise import privacy_sentence

    class Declared:
        noise, delta, protects, batch, steps = 1.0, 1e-5, "clients", 4, 8

    rounds = [Round(1, {0: ClientUpdate(1.0, 1.0, 64, 1.0, 0, 0), 1: ClientUpdate(1.0, 1.0, 32, 1.0, 0, 0)}, {}, 1.0)]
    assert privacy_sentence(rounds, Declared).startswith(
        f"epsilon {client_epsilon(1, 1.0, 1e-5):.2f} at delta 1e-05 for a client"
    )
    Declared.protects = "rows"
    assert "a row of a client with 32" in privacy_sentence(rounds, Declared)
    Declared.noise = 0.0
    assert "infinite" in privacy_sentence(rounds, Declared)


def test_epsilon_agrees_with_googles_accountant():
    rdp = pytest.importorskip("dp_accounting.rdp")
    event = pytest.importorskip("dp_accounting")
    for rounds, multiplier in ((1, 1.0), (16, 1.0), (100, 4.0)):
        accountant = rdp.RdpAccountant()
        accountant.compose(event.GaussianDpEvent(multiplier), rounds)
        assert client_epsilon(rounds, multiplier, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=0.02)


def test_the_epsilon_of_rows_is_that_of_the_sampled_gaussian():
    from effc.compiler.apps.federation.noise import row_epsilon

    assert row_epsilon(16, 1 / 16, 1.0, 1e-5) == pytest.approx(2.76, abs=0.05)  # dp-accounting's RDP, all orders
    assert row_epsilon(10, 1.0, 2.0, 1e-5) == pytest.approx(
        client_epsilon(10, 2.0, 1e-5), rel=0.01
    )  # nothing is sampled
    assert row_epsilon(10, 0.1, 2.0, 1e-5) < row_epsilon(20, 0.1, 2.0, 1e-5) < row_epsilon(20, 0.2, 2.0, 1e-5)

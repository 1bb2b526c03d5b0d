"""Interventions whose R stays orthonormal, and whose rotations are one function."""

import numpy as np
import pytest
from effc.compiler.apps.federation.median import geometric_median_shares
from effc.compiler.apps.federation.mixing import mix
from effc.compiler.apps.federation.rotations import (
    align_rotation,
    function_gram,
    nearest_orthonormal_rows,
    weighted_intervention_mean,
)


def intervention(seed, rank=4, width=32, path="layers.0"):
    draw = np.random.default_rng(seed)
    R = nearest_orthonormal_rows(draw.standard_normal((rank, width)))
    return {
        f"{path}.R": R,
        f"{path}.W": R + 0.3 * draw.standard_normal((rank, width)),
        f"{path}.b": draw.standard_normal(rank),
    }


def turned(state, seed):
    Q = nearest_orthonormal_rows(np.random.default_rng(seed).standard_normal((4, 4)))
    return {name: Q @ array for name, array in state.items()}


def phi(state, h):
    """h + R^T (W h + b - R h), row by row."""
    R, W, b = (state[f"layers.0.{part}"] for part in "RWb")
    return h + (h @ W.T + b - h @ R.T) @ R


H = np.random.default_rng(9).standard_normal((16, 32))


def off(state):
    R = state["layers.0.R"]
    return np.abs(R @ R.T - np.eye(len(R))).max()


def test_the_mean_of_orthonormal_matrices_is_not_one():
    three = [nearest_orthonormal_rows(np.random.default_rng(k).standard_normal((4, 64))) for k in range(3)]
    assert np.linalg.svd(sum(three) / 3)[1].max() < 0.8


@pytest.mark.parametrize("way", ["project", "align", "function"])
def test_R_is_orthonormal_after_every_mix(way):
    own, other = intervention(0), intervention(1)
    for share in (0.1, 0.5, 1.0):
        assert off(mix(own, other, share, way)) < 1e-12
    assert mix(own, other, 0.0, way)["layers.0.R"] is own["layers.0.R"]


@pytest.mark.parametrize("way", ["align", "function"])
def test_a_rotated_basis_of_a_client_does_not_change_the_aggregate(way):
    clients = {k: intervention(k) for k in range(3)}
    rotated = clients | {1: turned(clients[1], 7)}
    np.testing.assert_allclose(phi(rotated[1], H), phi(clients[1], H), atol=1e-12)
    third = dict.fromkeys(range(3), 1 / 3)
    made = [phi(weighted_intervention_mean(some, third, clients[0], way), H) for some in (clients, rotated)]
    np.testing.assert_allclose(*made, atol=1e-9)


def test_the_naive_aggregate_depends_on_the_basis():
    clients = {k: intervention(k) for k in range(3)}
    rotated = clients | {1: turned(clients[1], 7)}
    third = dict.fromkeys(range(3), 1 / 3)
    made = [phi(weighted_intervention_mean(some, third, clients[0], "project"), H) for some in (clients, rotated)]
    assert np.abs(made[0] - made[1]).max() > 0.1


@pytest.mark.parametrize("way", ["align", "function"])
def test_clients_that_learned_the_same_in_rotated_bases_keep_it(way):
    one = intervention(0)
    clients = {0: one, 1: turned(one, 5), 2: turned(one, 6)}
    made = weighted_intervention_mean(clients, dict.fromkeys(range(3), 1 / 3), turned(one, 8), way)
    np.testing.assert_allclose(phi(made, H), phi(one, H), atol=1e-9)


def test_in_function_space_the_aggregate_is_the_nearest_of_its_rank():
    """Two clients of rank 1 with functions in different directions: rank 2 holds their mean exactly."""
    clients = {k: intervention(k, rank=2) for k in range(2)}
    padded = {}
    for k, state in clients.items():  # the same functions with two unused directions
        R = state["layers.0.R"]
        free = np.linalg.svd(R)[2][2:4]
        padded[k] = {
            "layers.0.R": np.concatenate([R, free]),
            "layers.0.W": np.concatenate([state["layers.0.W"], free]),
            "layers.0.b": np.concatenate([state["layers.0.b"], np.zeros(2)]),
        }
        np.testing.assert_allclose(phi(padded[k], H), phi(state, H), atol=1e-12)
    made = weighted_intervention_mean(padded, {0: 0.5, 1: 0.5}, padded[0], "function")
    np.testing.assert_allclose(phi(made, H), (phi(clients[0], H) + phi(clients[1], H)) / 2, atol=1e-9)


def test_distances_of_functions_do_not_see_rotations():
    clients = {k: intervention(k) for k in range(4)}
    rotated = clients | {2: turned(clients[2], 3)}
    np.testing.assert_allclose(function_gram(clients), function_gram(rotated), atol=1e-9)
    shares = geometric_median_shares(function_gram(clients | {4: turned(clients[0], 2)}), np.ones(5))
    assert shares[0] == pytest.approx(shares[4], abs=1e-6)


def test_aligned_states_are_the_same_functions():
    own, other = intervention(0), intervention(1)
    np.testing.assert_allclose(phi(align_rotation(other, own), H), phi(other, H), atol=1e-12)


def test_other_arrays_are_combined_entry_by_entry():
    clients = {k: intervention(k) | {"head.weight": np.full(3, float(k))} for k in range(2)}
    for way in ("project", "align", "function"):
        assert (weighted_intervention_mean(clients, {0: 0.5, 1: 0.5}, clients[0], way)["head.weight"] == 0.5).all()

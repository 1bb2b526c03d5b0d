"""Adapters put together: L1 to L5 of the literature's algebra."""

import numpy as np
import pytest
from effc.compiler.apps.federation.low_rank import (
    padded_mean_weighted_by_update_norm,
    resize_lora_rank,
    stack_factors,
    truncate_to_rank,
    weight_update_of_adapter,
)
from effc.compiler.apps.federation.state import mean, normalized_weights

ALPHA = 16.0


def adapter(seed, rank=4, out=24, into=20):
    draw = np.random.default_rng(seed)
    return {"q.A": draw.standard_normal((rank, into)), "q.B": draw.standard_normal((out, rank))}


def exact(clients, weights):
    return sum(
        share * weight_update_of_adapter(clients[k], "q", ALPHA) for k, share in normalized_weights(weights).items()
    )


def product(state):
    return state["q.B"] @ state["q.A"]


MIXED = {0: adapter(0, 2), 1: adapter(1, 4), 2: adapter(2, 7)}
EQUAL = {k: adapter(k) for k in range(3)}
WEIGHTS = {0: 1.0, 1: 2.0, 2: 5.0}


@pytest.mark.parametrize("clients", [MIXED, EQUAL], ids=["ranks differ", "ranks equal"])
def test_stacking_is_exact(clients):
    np.testing.assert_allclose(product(stack_factors(clients, WEIGHTS, ALPHA)), exact(clients, WEIGHTS), atol=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 8, 13])
def test_truncation_misses_exactly_the_tail_of_the_singular_values(rank):
    want = exact(MIXED, WEIGHTS)
    made = truncate_to_rank(stack_factors(MIXED, WEIGHTS, ALPHA), rank, ALPHA)
    tail = np.linalg.svd(want)[1][rank:]
    assert np.linalg.norm(weight_update_of_adapter(made, "q", ALPHA) - want) == pytest.approx(
        np.linalg.norm(tail), abs=1e-9
    )


def test_the_mean_of_factors_is_not_the_mean_of_products():
    made = mean(EQUAL, dict.fromkeys(EQUAL, 1.0))
    want = exact(EQUAL, dict.fromkeys(EQUAL, 1.0))
    assert np.linalg.norm(weight_update_of_adapter(made, "q", ALPHA) - want) > 0.5 * np.linalg.norm(want)


def test_with_a_common_A_the_mean_of_factors_is_exact():
    clients = {k: state | {"q.A": EQUAL[0]["q.A"]} for k, state in EQUAL.items()}
    np.testing.assert_allclose(
        weight_update_of_adapter(mean(clients, WEIGHTS), "q", ALPHA), exact(clients, WEIGHTS), atol=1e-9
    )


def test_identical_clients_get_back_what_they_sent_by_every_method():
    clients = dict.fromkeys(range(3), adapter(4))
    want = weight_update_of_adapter(adapter(4), "q", ALPHA)
    np.testing.assert_allclose(weight_update_of_adapter(mean(clients, WEIGHTS), "q", ALPHA), want, atol=1e-9)
    np.testing.assert_allclose(product(stack_factors(clients, WEIGHTS, ALPHA)), want, atol=1e-9)
    np.testing.assert_allclose(
        weight_update_of_adapter(truncate_to_rank(stack_factors(clients, WEIGHTS, ALPHA), 4, ALPHA), "q", ALPHA),
        want,
        atol=1e-9,
    )
    np.testing.assert_allclose(
        weight_update_of_adapter(padded_mean_weighted_by_update_norm(clients, WEIGHTS, ALPHA), "q", ALPHA),
        want,
        atol=1e-9,
    )


def test_cutting_to_a_rank_and_filling_up_again_is_idempotent():
    for state in MIXED.values():
        once = resize_lora_rank(resize_lora_rank(state, 3), 7)
        twice = resize_lora_rank(resize_lora_rank(once, 3), 7)
        np.testing.assert_allclose(product(once), product(twice), atol=1e-12)


def test_a_larger_rank_leaves_the_update_as_it_was():
    state = adapter(0, 3)
    np.testing.assert_allclose(
        weight_update_of_adapter(resize_lora_rank(state, 8), "q", ALPHA),
        weight_update_of_adapter(state, "q", ALPHA),
        atol=1e-12,
    )


def test_the_scale_is_in_a_padded_mean_once_also_where_ranks_differ():
    """One client that counts and one that learned nothing: the result is half of the update, not half of B A."""
    idle = adapter(3, 6) | {"q.B": np.zeros((24, 6))}
    alone = padded_mean_weighted_by_update_norm({0: adapter(0, 2), 1: idle}, {0: 1.0, 1: 1.0}, ALPHA)
    np.testing.assert_allclose(
        weight_update_of_adapter(alone, "q", ALPHA), weight_update_of_adapter(adapter(0, 2), "q", ALPHA), atol=1e-9
    )

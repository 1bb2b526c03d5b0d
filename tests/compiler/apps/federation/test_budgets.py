"""Budgets of clients: the largest size within each, the least named, and sizes that are drawn anew each round."""

import numpy as np
import pytest
import torch
from effc.compiler.analysis.planning.shrink import flops_per_token, param_count
from effc.compiler.apps.federation.budgets import Load, training_bytes
from effc.compiler.apps.federation.coverage import assign_sandwich_sizes
from effc.compiler.apps.federation.sizes import (
    STEPS,
    Coverage,
    Scale,
    SubNetwork,
    largest_sub_networks,
    skeleton_of_sub_network,
)
from effc.compiler.apps.federation.strategy import TrainedState
from effc.compiler.ir.capture.capture import capture
from effc.dsl.checker.values import Bytes, Duration
from effc.dsl.syntax.diagnostics import Reject
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny

LOAD = Load(batch=2, length=16)


@pytest.fixture(scope="module")
def scale():
    return Scale(capture(tiny.model("llama")), LOAD)


@pytest.mark.parametrize("kind", ["params", "flops", "memory"])
@pytest.mark.slow
def test_a_size_is_the_largest_within_its_budget_and_grows_with_it(scale, kind):
    whole, least = scale.cost_of(kind, STEPS), scale.cost_of(kind, 1)
    assert 0 < least < whole
    found = []
    for share in np.linspace(least / whole, 1, 7):
        size = scale.largest_within(
            int(np.ceil(share * whole)) if kind != "memory" else Bytes(int(np.ceil(share * whole))), kind
        )
        step = max(n for n in range(1, STEPS + 1) if scale.sub_network_at(n).params == size.params)
        assert scale.cost_of(kind, step) <= np.ceil(share * whole)
        assert step == STEPS or scale.cost_of(kind, step + 1) > share * whole
        found.append(size.params)
    assert found == sorted(found) and found[-1] == scale.sub_network_at(STEPS).params


def test_what_a_size_takes_is_counted_on_what_is_left(scale):
    size = scale.sub_network_at(STEPS // 2)
    skeleton = skeleton_of_sub_network(scale.program, size)
    assert param_count(skeleton) == size.params
    assert scale.cost_of("flops", STEPS // 2) == flops_per_token(skeleton, LOAD.length)
    # weights, gradients and two moments are 16 bytes a parameter, the states of a round 12
    assert training_bytes(skeleton, LOAD) > 28 * size.params
    assert training_bytes(skeleton, Load(4, 16)) > training_bytes(skeleton, LOAD)


@pytest.mark.slow
def test_an_update_that_takes_long_enough_is_of_the_whole_model():
    program = capture(tiny.model("llama"))
    before = {n: p.detach().clone() for n, p in program.model.named_parameters()}
    (size,) = largest_sub_networks(program, [Duration(60.0)], load=LOAD)
    assert not size.indices
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in program.model.named_parameters())


@pytest.mark.parametrize(
    ("budget", "counts", "says", "help_"),
    [
        (10, "params", "is 10 parameters, and the smallest sub-network takes", "%"),
        (0.01, "flops", "FLOP a token", "%"),
        (Bytes(1000), "params", "of memory", "KiB"),
        (Duration(1e-9), "params", "an update", "ms"),
    ],
)
@pytest.mark.slow
def test_a_budget_that_nothing_fits_names_the_least(budget, counts, says, help_):
    with pytest.raises(Reject) as refused:
        largest_sub_networks(capture(tiny.model("llama")), [1.0, budget], counts, LOAD)
    (wrong,) = refused.value.diagnostics
    assert wrong.slug == "budget-too-small" and wrong.argument == "budgets"
    assert says in wrong.message and help_ in wrong.help


def test_the_least_that_is_named_is_enough(scale):
    from effc.compiler.apps.federation.budgets import amount_phrase, smallest_fitting_budget_text

    whole, least = scale.cost_of("memory", STEPS), scale.cost_of("memory", 1)
    said = smallest_fitting_budget_text("memory", least, whole)
    assert said.endswith("KiB") and amount_phrase("memory", least)
    assert (
        scale.largest_within(Bytes(int(said.removesuffix("KiB")) * 1024), "memory").params
        == scale.sub_network_at(1).params
    )


@given(clients=st.integers(1, 9), sizes=st.integers(1, 4), seed=st.integers(0, 999), data=st.data())
def test_nobody_draws_more_than_it_affords_and_both_ends_are_drawn(clients, sizes, seed, data):
    most = {k: data.draw(st.integers(0, sizes - 1)) for k in range(clients)}
    drawn = assign_sandwich_sizes(list(range(clients)), list(range(sizes)), seed, most)
    assert drawn == assign_sandwich_sizes(list(range(clients)), list(range(sizes)), seed, most)
    assert all(drawn[k] >= most[k] for k in range(clients))
    assert min(drawn.values()) == min(most.values())
    assert clients == 1 or max(drawn.values()) == sizes - 1


FULL = {"w": (4,)}
SIZES = (SubNetwork(4, {}, {}), SubNetwork(2, {}, {"w": ((0, 1),)}))


def test_sizes_are_drawn_anew_each_round_and_the_seed_says_which():
    def drawn(seed):
        made, found = Coverage(FULL, SIZES, {0: 0, 1: 0, 2: 1}, seed=seed), []
        made.begin({"w": np.zeros(4, np.float32)})
        for number in range(1, 7):
            made.prepare(number, [0, 1, 2])
            sizes = [made.payload(k, number, None).config["size"] for k in range(3)]
            assert 0 in sizes and 1 in sizes and sizes[2] == 1
            sent = {k: TrainedState({"w": np.ones(made.required_shapes(k)["w"], np.float32)}, 1) for k in range(3)}
            made.aggregate(number, sent)
            found.append(tuple(sizes))
        np.testing.assert_allclose(made.state["w"][:2], 1.0)  # which all train in every round
        return found

    assert drawn(3) == drawn(3) and len(set(drawn(3))) > 1
    assert tuple(drawn(3)) != tuple(drawn(4))


def test_with_budgets_alone_a_client_trains_the_same_size_in_all_rounds():
    made = Coverage(FULL, SIZES, {0: 0, 1: 1})
    made.begin({"w": np.zeros(4, np.float32)})
    for number in (1, 2):
        made.prepare(number, [0, 1])
        assert [made.payload(k, number, None).config["size"] for k in (0, 1)] == [0, 1]
    assert made.can_provide_initial_state(0) and not made.can_provide_initial_state(1)

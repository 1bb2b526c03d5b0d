"""Mixtures of experts and biases by distance in the native engine, against the same plan by plain torch operations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.engine_oracle import wanted_logits
from tests.kernels.engine_plans import mixture
from tests.kernels.test_engine import KERNELS, assert_near, engine, ids_of

ROUTES = {
    "softmax": {},
    "sigmoid": {"kind": "sigmoid", "normal": False, "scale": 1.7},
    "groups": {"kind": "sigmoid", "groups": 3, "kept": 2, "judges": 2},
    "best groups": {"groups": 3, "kept": 1, "normal": False},
    "one": {"count": 1},
    "logits": {"kind": "logits", "groups": 2, "kept": 1, "scale": 1.7},
    "near": {"kind": "near", "normal": False, "bias": None, "eps": 0.4, "scale": 1.5},
    "all": {"count": 6},
}


@pytest.mark.parametrize("kernel", [*KERNELS, "dense_linear_int4"])
def test_a_prompt_and_tokens_one_by_one_meet_the_experts_that_they_choose(kernel, level):
    built = mixture(kernel, inner=64 if "int4" in kernel else 24, hidden=64 if "int4" in kernel else 40)
    ids, share = ids_of(built, 40), 2**-4 if "int" in kernel else 2**-6
    wanted, own = wanted_logits(built, ids), engine(built)
    assert_near(own.run(ids[:33], [0] * 33), wanted[:33], share)
    for i in range(33, 40):
        assert_near(own.run([ids[i]], [0]), wanted[i : i + 1], share)


@pytest.mark.parametrize("name", ROUTES)
def test_a_router_chooses_as_torch_does(name, level):
    built = mixture(**ROUTES[name])
    ids = ids_of(built, 30)
    assert_near(engine(built).run(ids, [0] * 30), wanted_logits(built, ids))


@settings(max_examples=30, deadline=None)
@given(
    experts=st.integers(1, 9),
    count=st.integers(1, 9),
    inner=st.integers(1, 40),
    rows=st.integers(1, 70),
    threads=st.integers(1, 5),
    biases=st.booleans(),
    batch_invariant=st.booleans(),
)
def test_any_shape_of_a_mixture_is_what_torch_computes(experts, count, inner, rows, threads, biases, batch_invariant):
    built = mixture(experts=experts, count=min(count, experts), inner=inner, layers=1, biases=biases)
    ids = ids_of(built, rows)
    found = engine(built, threads, batch_invariant=batch_invariant).run(ids, [0] * rows)
    assert_near(found, wanted_logits(built, ids), 2**-5)


def test_more_rows_than_meet_an_expert_at_once_are_met_in_parts():
    built = mixture(experts=2, count=1)
    ids = ids_of(built, 120) * 3
    built.plan["context"] = 512
    assert_near(engine(built).run(ids, [0] * 360), wanted_logits(built, ids))


@pytest.mark.parametrize("count", [3, 12])
def test_sequences_of_different_lengths_choose_for_themselves(count):
    built = mixture()
    prompts = [ids_of(built, 2 + 5 * i % 17, seed=i) for i in range(count)]
    own = engine(built, max_sequences=count)
    own.run([t for p in prompts for t in p[:-1]], [i for i, p in enumerate(prompts) for _ in p[:-1]], [])
    found = own.run([p[-1] for p in prompts], range(count))
    for row, prompt in zip(found, prompts, strict=True):
        assert_near(row[None], wanted_logits(built, prompt)[-1:])


def test_steady_logits_of_a_mixture_do_not_depend_on_what_else_a_call_computes(level):
    built = mixture("dense_linear_int8")
    prompts = [ids_of(built, n, seed=n) for n in (40, 3, 17)]
    alone = [engine(built, 1, batch_invariant=True).run(p, [0] * len(p), [len(p) - 1])[0] for p in prompts]
    own = engine(built, 3, max_sequences=3, batch_invariant=True)
    last = [sum(map(len, prompts[: i + 1])) - 1 for i in range(3)]
    found = own.run([t for p in prompts for t in p], [i for i, p in enumerate(prompts) for _ in p], last)
    assert torch.equal(found, torch.stack(alone))


def test_what_is_not_a_number_chooses_experts_that_are_there():
    built = mixture()
    built.weights[built.plan["steps"][0]["table"]][7] = float("nan")
    found = engine(built, max_sequences=2).run([1, 7, 1, 2], [0, 0, 1, 1])
    assert found[1].isnan().any() and not found[2:].isnan().any()


def test_scores_fall_with_the_distance_by_the_slope_of_a_head(level):
    built = mixture(slopes=True)
    ids = ids_of(built, 75)
    wanted, own = wanted_logits(built, ids), engine(built)
    assert_near(own.run(ids[:70], [0] * 70), wanted[:70])
    for i in range(70, 75):
        assert_near(own.run(ids[i : i + 1], [0]), wanted[i : i + 1])

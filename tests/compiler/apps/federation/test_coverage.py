"""Clients that hold parts: counted coverage, budgets and the sandwich."""

import numpy as np
from effc.compiler.apps.federation.coverage import assign_sandwich_sizes, coverage_mean, slice_state
from effc.compiler.apps.federation.state import mean, n_bytes_of_state
from hypothesis import given
from hypothesis import strategies as st

WHOLE = {"up": np.arange(24.0).reshape(6, 4), "down": np.arange(24.0).reshape(4, 6) + 100, "norm": np.arange(4.0)}


def width(keep):
    kept = np.arange(keep)
    return {"up": (kept, None), "down": (None, kept)}


def test_a_part_is_the_leading_block():
    part = slice_state(WHOLE, width(3))
    assert (part["up"] == WHOLE["up"][:3]).all() and (part["down"] == WHOLE["down"][:, :3]).all()
    assert (part["norm"] == WHOLE["norm"]).all()


def test_parts_of_the_whole_put_together_are_the_whole():
    indices = {0: width(2), 1: width(5), 2: width(3)}
    parts = {k: slice_state(WHOLE, index) for k, index in indices.items()}
    made = coverage_mean(WHOLE, parts, indices, {0: 1.0, 1: 3.0, 2: 2.0})
    for name in WHOLE:
        np.testing.assert_allclose(made[name], WHOLE[name])


def test_what_few_hold_is_not_shrunk_and_what_nobody_holds_stays():
    whole = {"x": np.ones((3, 3))}
    corner = {"x": (np.arange(2), np.arange(2))}
    made = coverage_mean(
        whole, {0: {"x": np.ones((3, 3))}, 1: {"x": np.full((2, 2), 2.0)}}, {0: {}, 1: corner}, {0: 1.0, 1: 1.0}
    )["x"]
    assert made[0, 0] == 1.5 and made[2, 2] == 1.0
    kept = coverage_mean(whole, {1: {"x": np.full((2, 2), 2.0)}}, {1: corner}, {1: 1.0})["x"]
    assert kept[0, 0] == 2.0 and kept[2, 2] == 1.0


@given(st.sampled_from(["all", "holders"]), st.integers(0, 99))
def test_who_sends_back_what_it_was_sent_changes_nothing(counted, seed):
    indices, draw = {0: {}, 1: width(2), 2: width(5)}, np.random.default_rng(seed)
    whole = {name: draw.standard_normal(array.shape) for name, array in WHOLE.items()}
    parts = {k: slice_state(whole, index) for k, index in indices.items()}
    made = coverage_mean(whole, parts, indices, {0: 1.0, 1: 3.0, 2: 2.0}, counted)
    for name in whole:
        np.testing.assert_allclose(made[name], whole[name], atol=1e-12)


@given(st.integers(0, 99))
def test_a_part_has_the_entries_whose_indices_it_names_along_each_axis(seed):
    draw = np.random.default_rng(seed)
    axes = [None if draw.random() < 0.4 else np.flatnonzero(draw.random(size) < 0.6) for size in (6, 4, 5)]
    whole = draw.standard_normal((6, 4, 5))
    rows, columns, depth = (range(n) if axis is None else axis for n, axis in zip((6, 4, 5), axes, strict=True))
    part = slice_state({"x": whole}, {"x": tuple(axes)})["x"]
    assert part.tolist() == [[[whole[i, j, k] for k in depth] for j in columns] for i in rows]
    assert not np.shares_memory(part, whole)


def test_what_one_client_holds_alone_moves_by_its_share_of_the_data_or_all_the_way():
    whole, corner = {"x": np.zeros(3)}, {"x": (np.arange(2),)}
    sent = {0: {"x": np.full(3, 8.0)}, 1: {"x": np.full(2, 4.0)}}
    by_share = coverage_mean(whole, sent, {0: {}, 1: corner}, {0: 1.0, 1: 3.0}, "all")["x"]
    by_holders = coverage_mean(whole, sent, {0: {}, 1: corner}, {0: 1.0, 1: 3.0}, "holders")["x"]
    assert by_share.tolist() == [5.0, 5.0, 2.0] and by_holders.tolist() == [5.0, 5.0, 8.0]


def test_clients_of_equal_size_are_averaged_as_always():
    draw = np.random.default_rng(0)
    parts = {k: {n: draw.standard_normal(a.shape) for n, a in WHOLE.items()} for k in range(3)}
    weights = {0: 1.0, 1: 4.0, 2: 2.0}
    made, want = coverage_mean(WHOLE, parts, {k: {} for k in parts}, weights), mean(parts, weights)
    for name in WHOLE:
        np.testing.assert_allclose(made[name], want[name])


def test_bytes_up_follow_the_size_of_the_part():
    assert n_bytes_of_state(slice_state(WHOLE, width(3))) == 8 * (3 * 4 + 4 * 3 + 4)


def test_a_sandwich_has_both_ends_and_is_the_same_for_a_seed():
    options, clients = ("large", "middle", "small"), list(range(6))
    chosen = assign_sandwich_sizes(clients, options, 3)
    assert chosen == assign_sandwich_sizes(clients, options, 3)
    assert {"large", "small"} <= set(chosen.values())
    assert len({tuple(assign_sandwich_sizes(clients, options, seed).values()) for seed in range(5)}) > 1
    assert assign_sandwich_sizes([7], options, 0) == {7: "large"}

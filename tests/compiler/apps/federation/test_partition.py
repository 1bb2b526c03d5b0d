"""Whose rows are whose."""

import pytest
from effc.compiler.apps.federation.partition import partition_rows, split_train_and_validation
from effc.dsl.syntax.diagnostics import Reject
from hypothesis import given
from hypothesis import strategies as st


@given(
    st.lists(st.integers(20, 60), min_size=1, max_size=3),
    st.integers(1, 5),
    st.sampled_from(["even", "blocks"]),
    st.integers(0, 9),
)
def test_every_row_is_one_clients_and_sizes_are_alike(sizes, clients, split, seed):
    parts = partition_rows(sizes, clients, split, 0.5, seed)
    rows = [row for part in parts for row in part]
    assert sorted(rows) == [(k, row) for k, size in enumerate(sizes) for row in range(size)]
    assert max(map(len, parts)) - min(map(len, parts)) <= len(sizes)
    assert parts == partition_rows(sizes, clients, split, 0.5, seed)


def test_blocks_lie_together():
    assert partition_rows([9], 3, "blocks", 0.5, 0) == [[(0, r) for r in range(k, k + 3)] for k in (0, 3, 6)]


def test_distinct_clients_have_a_data_set_each():
    assert partition_rows([2, 3], 2, "distinct", 0.5, 0) == [[(0, 0), (0, 1)], [(1, 0), (1, 1), (1, 2)]]


def test_a_small_beta_makes_clients_differ_more():
    def apart(beta):
        sizes = [len(part) for seed in range(8) for part in partition_rows([4000], 4, "dirichlet", beta, seed)]
        return max(sizes) - min(sizes)

    assert apart(0.5) > apart(50.0)
    assert sum(map(len, partition_rows([4000, 100], 4, "dirichlet", 1.0, 0))) == 4100


@pytest.mark.parametrize("split", ["even", "blocks", "dirichlet", "distinct"])
def test_a_client_without_rows_is_refused_by_name(split):
    with pytest.raises(Reject) as refused:
        partition_rows([3], 4, split, 0.5, 0)
    assert refused.value.diagnostics[0].slug == "empty-client"


def test_rows_held_back_are_not_learned_from():
    learn, held = split_train_and_validation(20, 0.25, 3)
    assert len(held) == 5 and sorted(learn + held) == list(range(20))
    assert split_train_and_validation(1, 0.5, 0) == ([0], [])
    assert split_train_and_validation(5, 0.0, 0) == ([0, 1, 2, 3, 4], [])

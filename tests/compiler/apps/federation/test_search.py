"""Documents stay with their clients, and what is found is what one index over all of them would find."""

from pathlib import Path

import numpy as np
import pytest
from effc.compiler.apps.federation.app import PACKAGE
from effc.compiler.apps.federation.client_host import ClientHost
from effc.compiler.apps.federation.declaration import read_declaration
from effc.compiler.apps.federation.grid import LocalGrid
from effc.compiler.apps.federation.rounds import Terms
from effc.compiler.apps.federation.search import (
    RetrievalClient,
    RetrievalFederation,
    RetrievalStrategy,
    merge_top_documents,
    top_scores_and_documents,
)
from effc.compiler.apps.federation.simulation import simulate_federation
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.dsl.syntax.diagnostics import Reject
from hypothesis import given
from hypothesis import strategies as st

RECIPES = Path(__file__).parents[4] / "recipes" / "federated"


def unit(draw, count, width=8):
    made = draw.standard_normal((count, width))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=5), best=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_best_of_the_bests_are_those_of_one_index(counts, best, seed):
    draw = np.random.default_rng(seed)
    questions, shares = unit(draw, 3), [unit(draw, n) for n in counts]
    owners, numbers = merge_top_documents(
        {k: top_scores_and_documents(questions, own, best) for k, own in enumerate(shares)}, best
    )
    _, wanted = top_scores_and_documents(questions, np.concatenate(shares), best)
    starts = np.cumsum([0, *counts])
    np.testing.assert_array_equal(starts[owners] + numbers, wanted)


def library(faults=(), count=2):
    """Three clients with four documents and two questions each, whose answers lie with the next client."""
    draw = np.random.default_rng(0)
    documents = [unit(draw, 4) for _ in range(3)]
    clients = []
    for k in range(3):
        partners = np.array([[(k + 1) % 3, 1], [(k + 1) % 3, 2]])
        asked = np.stack([documents[owner][n] for owner, n in partners])
        clients.append(Faulty(k, "a" * 64, asked, documents[k], partners, count))
        clients[-1].faults = faults
    made = RetrievalFederation(
        LocalGrid(clients, 3), RetrievalStrategy({}), Terms(9, 3, "a" * 64, every=0.002, deadline=2.0)
    )
    made.count = count
    return made


class Faulty(RetrievalClient):
    def __call__(self, message, memory):
        answer = super().__call__(message, memory)
        if self.client == 1 and message.kind in self.faults:
            if "raises" in self.faults:
                raise RuntimeError("disk is gone")
            for state in answer.arrays.values():
                next(iter(state.values()))[:] = np.nan
        return answer


def test_questions_are_answered_by_whoever_has_the_document():
    rounds = library().run().rounds
    assert [list(r.updates) for r in rounds] == [[0], [1], [2]]
    assert [r.updates[k].accuracy for k, r in enumerate(rounds)] == [1.0] * 3
    turn = rounds[0].updates[0]
    assert turn.bytes_up == 2 * 8 * 4 + 3 * 2 * 2 * (4 + 8)  # vectors; scores and numbers of three clients
    assert turn.bytes_down == 3 * 2 * 8 * 4 + 2 * 2 * (8 + 8)  # vectors to three; owners and numbers


@pytest.mark.parametrize("faults", [("search",), ("search", "raises")])
def test_a_client_that_answers_nonsense_is_searched_without_and_named(faults):
    rounds = library(faults).run().rounds
    assert all(1 in r.faults for r in rounds)
    assert [r.updates[k].accuracy for k, r in enumerate(rounds)] == [0.0, 1.0, 1.0]  # client 0 asks for what 1 has


def test_a_client_whose_questions_are_nonsense_gets_no_answer_and_the_others_do():
    rounds = library(("ask",)).run().rounds
    assert [list(r.updates) for r in rounds] == [[0], [], [2]] and 1 in rounds[1].faults


def test_vectors_of_another_width_are_refused_by_the_client():
    run = library()
    one = run.grid.clients[1]
    one.questions = np.ones((2, 5), np.float32)
    assert "no vectors of this model's width" in run.run().rounds[0].faults[0]


@pytest.mark.slow
def test_the_shipped_index_finds_every_verse_wherever_it_is_and_as_one_index_does(tmp_path):
    (made,) = api.compile(RECIPES / "search.effspec", out=tmp_path, cache_dir=tmp_path / "c", force=True)
    path = made.artifacts[0].path
    declared = read_declaration(path / PACKAGE / "federation.json")
    run = simulate_federation(declared, path / declared.folder, RECIPES, Settings(tmp_path / "c"))
    assert [r.updates[k].accuracy for k, r in enumerate(run.course.rounds)] == [1.0] * 4
    place = ClientHost(declared, path / declared.folder, RECIPES, Settings(tmp_path / "c"))
    with place.participants([0, 1, 2, 3]) as seats:
        assert sum(len(s.documents) for s in seats) == sum(len(s.questions) for s in seats) == 60
        elsewhere = [owner != s.client for s in seats for owner, _ in s.partners]
        assert 20 < sum(elsewhere) < 60
    assert "search what all of them have" in (path / "README.md").read_text()


@pytest.mark.parametrize(
    ("data", "more", "says"),
    [
        ('text("w.txt", samples: 8, length: 16)', "trains: index, strategy: search", "`w` has none"),
        ('texts("w.txt", length: 16)', "trains: index, strategy: search", "`w` has none"),
        ('texts("w.txt", length: 16)', "trains: index", "searched, and not trained"),
        ('texts("w.txt", length: 16)', "strategy: search", "trains nothing"),
    ],
)
def test_what_can_not_be_searched_is_refused(tmp_path, data, more, says):
    (tmp_path / "w.txt").write_text("Ann pays three coins for apples.\n" * 60)
    (tmp_path / "r.effspec").write_text(
        f'effspec 1\nmodel base = zoo("tiny-llama")\ndata w = {data}\npipeline p(base) {{}}\n'
        f'emit p {{ flower("fed", data: w, {more}) }}\n'
    )
    with pytest.raises(Reject, match=says):
        api.compile(tmp_path / "r.effspec", out=tmp_path / "out", cache_dir=tmp_path / "cache")

"""Tasks that come one after another: which is learned when, what is remembered, what forgetting is."""

import math
from pathlib import Path

import numpy as np
import pytest
from effc.compiler.apps.federation.app import PACKAGE
from effc.compiler.apps.federation.averaging import FedAvg
from effc.compiler.apps.federation.declaration import read_declaration
from effc.compiler.apps.federation.history import ClientUpdate, History, Round
from effc.compiler.apps.federation.simulation import simulate_federation
from effc.compiler.apps.federation.stream import forgetting_by_task, task_index_of_round
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.dsl.syntax.diagnostics import Reject
from hypothesis import given
from hypothesis import strategies as st

from tests.compiler.apps.federation.least_squares import FULL, Regression, federation

RECIPES = Path(__file__).parents[4] / "recipes" / "federated"


@given(rounds=st.integers(1, 40), tasks=st.integers(1, 40))
def test_tasks_come_in_order_and_share_the_rounds_evenly(rounds, tasks):
    if tasks > rounds:
        return
    found = [task_index_of_round(number, rounds, tasks) for number in range(1, rounds + 1)]
    counts = [found.count(task) for task in range(tasks)]
    assert found == sorted(found) and max(counts) - min(counts) <= 1 and min(counts) >= 1


def turn(*tasks):
    return ClientUpdate(0.0, 0.0, 1.0, 0.0, 0, 0, by_task=tasks)


def test_forgetting_is_how_much_worse_a_task_is_done_than_when_it_was_learned():
    rounds = [
        Round(1, {0: turn(3.0), 1: turn(5.0)}, {}, 0.0),
        Round(2, {0: turn(2.0), 1: turn(math.nan)}, {}, 0.0),  # client 1 keeps no rows of it back
        Round(3, {0: turn(2.5, 1.0), 1: turn(math.nan, 4.0)}, {}, 0.0),
        Round(4, {0: turn(2.75, 0.5, 9.0), 1: turn(math.nan, 4.5, 9.0)}, {}, 0.0),
    ]
    assert forgetting_by_task(rounds) == [0.75, 0.0]  # task 2: one client gained half, the other lost it
    again = [Round.from_json(r.to_json()) for r in rounds]
    assert forgetting_by_task(again) == forgetting_by_task(rounds) and math.isnan(again[1].updates[1].by_task[0])
    assert forgetting_by_task(rounds[:2]) == [] and History(rounds).bytes == 0


class Anchored(Regression):
    """Remembers what it was given as the beginning of its task."""

    anchors = True

    def begin(self, number, rounds):
        self.task = task_index_of_round(number, rounds, 2)

    def train(self, state, names, added, seed, until):
        self.seen = [*getattr(self, "seen", []), {n: a.copy() for n, a in self.anchor.items()}]
        self.began = [*getattr(self, "began", []), state]
        return super().train(state, names, added, seed, until)


def test_the_anchor_is_what_a_task_began_with_until_the_next_one():
    run = federation(FedAvg(FULL), clients=3, rounds=4)
    learners = [Anchored(k) for k in range(3)]
    for participant, learner in zip(run.grid.clients.values(), learners, strict=True):
        participant.learner = learner
    run.run()
    for learner in learners:
        wanted = [learner.began[0], learner.began[0], learner.began[2], learner.began[2]]
        for seen, state in zip(learner.seen, wanted, strict=True):
            assert all(np.array_equal(seen[n], state[n]) for n in state)


class Elsewhere(Anchored):
    """Has rows of the second task alone."""

    def begin(self, number, rounds):
        super().begin(number, rounds)
        self.examples = 24 * self.task


def test_a_client_without_rows_of_a_task_sits_out_its_rounds_and_says_why():
    run = federation(FedAvg(FULL), clients=3, rounds=4)
    list(run.grid.clients.values())[1].learner = Elsewhere(1)
    rounds = run.run().rounds
    assert [sorted(r.updates) for r in rounds] == [[0, 2], [0, 2], [0, 1, 2], [0, 1, 2]]
    assert "it has no rows of the task of round 1" in rounds[0].faults[1] and not rounds[2].faults


@pytest.mark.parametrize(
    ("data", "more", "says"),
    [
        ("[a, b]", "stream: true, rounds: 1", "needs a round for each set"),
        ("a", "stream: true", "a stream of one data set"),
        ("[a, b]", "anchor: 1.0", "there is no stream"),
        ("[a, b]", "stream: true, rounds: 2, anchor: 100, lr: 1e-2", "learn nothing"),
        ("[a, b]", "stream: true, split: distinct, clients: 2", "`stream` all in turn"),
    ],
)
def test_a_stream_that_can_not_be_is_refused(tmp_path, data, more, says):
    (tmp_path / "w.txt").write_text("Ann pays three coins for apples. " * 60)
    (tmp_path / "r.effspec").write_text(
        'effspec 1\nmodel base = zoo("tiny-llama")\n'
        + "".join(f'data {n} = text("w.txt", samples: 12, length: 16, seed: {k})\n' for k, n in enumerate("ab"))
        + f'pipeline p(base) {{}}\nemit p {{ flower("fed", data: {data}, {more}) }}\n'
    )
    with pytest.raises(Reject, match=says):
        api.compile(tmp_path / "r.effspec", out=tmp_path / "out", cache_dir=tmp_path / "cache")


@pytest.mark.heavy
def test_the_shipped_stream_forgets_less_with_its_anchor_than_without(tmp_path):
    (made,) = api.compile(RECIPES / "continual.effspec", out=tmp_path, cache_dir=tmp_path / "c", force=True)
    path = made.artifacts[0].path
    declared = read_declaration(path / PACKAGE / "federation.json")
    worse, gains = [], []
    for anchor in (declared.anchor, 0.0):
        said = declared.with_changes(anchor=anchor)
        rounds = simulate_federation(said, path / said.folder, RECIPES, Settings(tmp_path / "c")).course.rounds
        worse.append(forgetting_by_task(rounds)[0])
        gains.append(np.mean([t.by_task[1] for t in rounds[-1].updates.values()]))
    assert worse[0] < worse[1]
    assert gains[0] < np.log(3)  # and still learns the second: three of two answers would be chance

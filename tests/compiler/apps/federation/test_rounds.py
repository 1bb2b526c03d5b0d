"""The round loop: every method learns, faults leave one client out, and a killed server goes on to the same bits."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from effc.compiler.apps.federation.averaging import FedAvg, FrozenA
from effc.compiler.apps.federation.checkpoint import Checkpoint
from effc.compiler.apps.federation.grid import LocalGrid
from effc.compiler.apps.federation.low_rank import weight_update_of_adapter
from effc.compiler.apps.federation.personal import AllButMe
from effc.compiler.apps.federation.products import PaddedAverage, StackedAverage, TruncatedAverage
from effc.compiler.apps.federation.rounds import fault_lines
from effc.dsl.syntax.diagnostics import Reject

from tests.compiler.apps.federation.least_squares import ALPHA, FULL, federation
from tests.compiler.apps.federation.states import state_hash

RANKS = {0: 2, 1: 4, 2: 3, 3: 4}
STRATEGIES = {
    "fedavg": lambda: FedAvg(FULL),
    "ffa": lambda: FrozenA(FULL),
    "stack": lambda: StackedAverage(FULL, ALPHA, RANKS),
    "svd": lambda: TruncatedAverage(FULL, ALPHA, RANKS),
    "hetlora": lambda: PaddedAverage(FULL, ALPHA, RANKS),
    "abm mean": lambda: AllButMe(FULL, "mean", "align", 0.5),
    "abm median": lambda: AllButMe(FULL, "median", "align", 0.5),
    "abm adaptive": lambda: AllButMe(FULL, "mean", "align", None),
    "alone": lambda: AllButMe(FULL, "mean", "align", 0.0),
}


def results(run):
    return {name: state_hash(state) for name, state in run.strategy.results().items()}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_method_learns(name):
    run = federation(STRATEGIES[name](), rounds=8)
    course = run.run()
    first, last = course.rounds[0], course.rounds[-1]
    assert np.mean([t.before for t in first.updates.values()]) > 2 * last.loss
    assert not fault_lines(course.rounds)
    assert set(run.strategy.results()) == ({f"client-{k}" for k in range(4)} if run.strategy.personal else {"global"})


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("kept", [1, 3])
def test_a_server_killed_between_rounds_goes_on_to_the_same_bits(name, kept, tmp_path):
    whole = federation(STRATEGIES[name](), rounds=5)
    whole.run()
    first = federation(STRATEGIES[name](), rounds=kept, checkpoint=Checkpoint(tmp_path, "run"))
    first.run()
    again = federation(STRATEGIES[name](), rounds=5, checkpoint=Checkpoint(tmp_path, "run"))  # with new, empty nodes
    course = again.run()
    assert results(again) == results(whole)
    assert [r.number for r in course.rounds] == [1, 2, 3, 4, 5]
    assert [r.loss for r in course.rounds] == [r.loss for r in whole.course.rounds]


KILLED = """
import time
from pathlib import Path
from effc.compiler.apps.federation.checkpoint import Checkpoint
from tests.compiler.apps.federation.least_squares import Regression, federation
from tests.compiler.apps.federation.test_rounds import STRATEGIES

learn = Regression.train
Regression.train = lambda self, *given: time.sleep(0.3) or learn(self, *given)
tell = lambda r: print(r.number, flush=True)
run = federation(STRATEGIES[{name!r}](), rounds=5, checkpoint=Checkpoint(Path({folder!r}), "run"))
run.on_round = tell
run.run()
"""


@pytest.mark.parametrize("name", ["abm median", "stack"])
@pytest.mark.slow
def test_a_server_killed_in_the_middle_of_a_round_goes_on_to_the_same_bits(name, tmp_path):
    whole = federation(STRATEGIES[name](), rounds=5)
    whole.run()
    code = KILLED.format(name=name, folder=str(tmp_path))
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[4]
    )
    assert server.stdout.readline() == "1\n" and server.stdout.readline() == "2\n"
    time.sleep(0.15)  # clients of round 3 are learning
    server.send_signal(signal.SIGKILL)
    said, _ = server.communicate(timeout=20)
    assert server.returncode == -signal.SIGKILL and said == ""
    again = federation(STRATEGIES[name](), rounds=5, checkpoint=Checkpoint(tmp_path, "run"))
    told = []
    again.on_round = lambda round_: told.append(round_.number)
    again.run()
    assert told == [3, 4, 5] and results(again) == results(whole)


class Mortal(LocalGrid):
    """A node that is killed in the middle of round 2, and another that comes in its place before round 4."""

    def get_node_ids(self):
        return [node for node in self.clients if node != 99 or self.round >= 3][self.dead :]

    dead, round = 0, 0

    def push_messages(self, messages):
        messages = list(messages)
        self.round = max((m.number for m in messages if m.kind == "train"), default=self.round)
        if self.round == 2:
            messages, self.dead = [m for m in messages if m.node != 1], 1
        return super().push_messages(messages)


@pytest.mark.parametrize("name", ["fedavg", "stack", "abm mean"])
def test_a_client_killed_in_a_round_is_missed_and_its_next_node_takes_its_place(name):
    run = federation(STRATEGIES[name](), rounds=5, deadline=1.0)
    grid = Mortal(list(run.grid.clients.values()), 4)
    grid.clients[99], grid.memories[99], grid._locks[99] = grid.clients[1], {}, threading.Lock()
    run.grid = grid
    rounds = run.run().rounds
    assert [sorted(r.updates) for r in rounds] == [[0, 1, 2, 3], [1, 2, 3], [1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert rounds[1].faults == {0: "no reply within 1 s"} and not rounds[3].faults
    assert rounds[4].loss < rounds[0].loss


def test_rounds_of_another_number_of_threads_are_not_gone_on_with(tmp_path):
    import torch

    Checkpoint(tmp_path, "one").write_round(3, {"fedavg": {"a": np.zeros(2)}}, {})
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    with pytest.raises(Reject, match=f"round 3 was computed with {before} threads, and there are {before + 1} now"):
        Checkpoint(tmp_path, "one").read_last_round()
    torch.set_num_threads(before)
    states, body = Checkpoint(tmp_path, "one").read_last_round()
    assert states["fedavg"]["a"].tolist() == [0, 0] and body == {"number": 3}


def test_a_checkpoint_of_another_federation_is_not_taken(tmp_path):
    federation(FedAvg(FULL), rounds=2, checkpoint=Checkpoint(tmp_path, "one")).run()
    other = federation(FedAvg(FULL), rounds=2, checkpoint=Checkpoint(tmp_path, "two"))
    fresh = federation(FedAvg(FULL), rounds=2)
    other.run(), fresh.run()
    assert results(other) == results(fresh)


@pytest.mark.parametrize("name", ["fedavg", "stack", "abm median"])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("raises", "out of memory"),
        ("NaN", "`m.B` holds NaN"),
        ("shape", "`m.B` is (6, 2), not (6, 4)"),
        ("stale base", "the base model here is bbbbbbbbbbbb"),
        ("slow", "no reply within 2 s"),
        ("replays", "its reply is of round 1"),
        ("counts in words", "it has no data"),
        ("counts in lists", "its reply is of round [2.0]"),
        ("counts without end", "it has no data"),
    ],
)
def test_a_faulty_client_is_left_out_of_its_round_and_comes_back(name, fault, says):
    late = {"deadline": 2.0} if fault == "slow" else {}
    course = federation(STRATEGIES[name](), rounds=4, fault=fault, **late).run()
    assert says in course.rounds[1].faults[1]
    assert sorted(course.rounds[1].updates) == [0, 2, 3]
    back = [] if fault == "stale base" else [1]
    assert sorted(course.rounds[3].updates) == sorted([0, 2, 3, *back])
    assert course.rounds[3].loss < course.rounds[0].loss


@pytest.mark.parametrize("name", ["ffa", "stack", "abm mean"])
def test_a_node_that_lost_its_memory_costs_its_client_no_more_than_a_round(name):
    course = federation(STRATEGIES[name](), rounds=4, fault="forgets").run()
    assert 1 in course.rounds[0].updates and 1 in course.rounds[2].updates and 1 in course.rounds[3].updates


def test_a_client_without_data_is_left_out_and_named():
    run = federation(FedAvg(FULL), rows=0, clients=3)
    with pytest.raises(Reject) as refused:
        run.run()
    assert "2 of 3 clients" in str(refused.value)
    assert refused.value.diagnostics[0].note == "client 1: it has no data"
    course = federation(FedAvg(FULL), rows=0, clients=4, rounds=2)
    course.terms = course.terms.__class__(**{**course.terms.__dict__, "clients": 3})
    assert sorted(course.run().rounds[0].updates) == [0, 2, 3]


def test_a_client_that_does_not_say_which_it_is_is_left_out_and_named():
    with pytest.raises(Reject) as refused:
        federation(FedAvg(FULL), fault="nameless").run()
    assert "3 of 4 clients" in str(refused.value)
    assert refused.value.diagnostics[0].note == "it does not say which client it is"


def test_a_round_without_enough_states_stops_the_run_with_a_sentence():
    run = federation(FedAvg(FULL), clients=2, fault="NaN", least=2)
    with pytest.raises(Reject) as refused:
        run.run()
    assert refused.value.diagnostics[0].slug == "too-few-clients"
    assert "round 2: 1 of 2 clients sent a usable state" in str(refused.value)


def test_a_client_that_keeps_the_only_worker_stops_the_run_and_is_named():
    run = federation(FedAvg(FULL), fault="slow", workers=1, deadline=0.2, least=4)
    started = time.monotonic()
    with pytest.raises(Reject) as refused:
        run.run()
    assert time.monotonic() - started < 10
    assert "client 1: no reply within 0.2 s" in refused.value.diagnostics[0].note


def test_some_clients_take_part_in_a_round_and_the_seed_says_which():
    runs = [federation(AllButMe(FULL, "mean", "align", 0.5), rounds=5, share=0.5, seed=seed) for seed in (0, 0, 1)]
    parts = [[sorted(r.updates) for r in run.run().rounds] for run in runs]
    assert all(len(clients) == 2 for clients in parts[0])
    assert parts[0] == parts[1] != parts[2]
    assert results(runs[0]) == results(runs[1])


def test_clients_keep_a_state_in_memory_only_where_it_is_personal():
    for name, is_personal in (("fedavg", False), ("abm mean", True)):
        run = federation(STRATEGIES[name](), rounds=1)
        run.run()
        assert [("own" in memory) for memory in run.grid.memories.values()] == 4 * [is_personal]


def test_stacking_leaves_the_exact_mean_of_what_was_learned():
    run = federation(STRATEGIES["stack"](), rounds=3)
    run.run()
    total = sum(stack["m.B"].astype(np.float64) @ stack["m.A"] for stack in run.strategy.rounds.values())
    np.testing.assert_allclose(weight_update_of_adapter(run.strategy.results()["global"], "m", ALPHA), total, atol=1e-5)


def test_bytes_are_those_of_the_arrays():
    size = 4 * sum(a * b for a, b in FULL.values())
    turns = federation(FedAvg(FULL), rounds=2).run().rounds[1].updates
    assert {t.bytes_up for t in turns.values()} == {size} == {t.bytes_down for t in turns.values()}
    frozen = federation(FrozenA(FULL), rounds=2).run().rounds
    assert (
        {t.bytes_up for t in frozen[1].updates.values()}
        == {4 * 6 * 4}
        == {t.bytes_down for t in frozen[1].updates.values()}
    )
    alone = federation(AllButMe(FULL, "mean", "align", 0.0), rounds=2).run().rounds
    assert alone[1].bytes_down == 0


def test_clipping_and_noise_move_the_mean_by_a_bounded_step():
    run = federation(FedAvg(FULL, clip=0.01, noise=0.0), rounds=1)
    run.run()
    start = run.strategy.initial
    moved = np.sqrt(sum(((run.strategy.state[n] - start[n]) ** 2).sum() for n in start))
    assert 0 < moved <= 0.01 + 1e-6

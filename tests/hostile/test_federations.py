"""One hostile client costs a federation that client, and a hostile server costs a client nothing."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from effc.compiler.apps.federation.averaging import FedAvg
from effc.compiler.apps.federation.bounds import DAY, Bounds, require_deadline_s
from effc.compiler.apps.federation.client import Participant
from effc.compiler.apps.federation.flower import FlowerGrid
from effc.compiler.apps.federation.grid import Answer, Message
from effc.compiler.apps.federation.personal import AllButMe
from effc.compiler.apps.federation.products import PaddedAverage, StackedAverage, TruncatedAverage
from effc.compiler.apps.federation.secure import SecureSum
from effc.compiler.apps.federation.strategy import TrainedState
from effc.dsl.syntax.diagnostics import Reject

from tests.compiler.apps.federation.least_squares import ALPHA, FULL, RANK, Regression, federation

STRATEGIES = {
    "fedavg": lambda: FedAvg(FULL),
    "clipped": lambda: FedAvg(FULL, clip=1.0, noise=0.1, seed=1),
    "stack": lambda: StackedAverage(FULL, ALPHA, {}),
    "svd": lambda: TruncatedAverage(FULL, ALPHA, {}),
    "hetlora": lambda: PaddedAverage(FULL, ALPHA, {}),
    "abm mean": lambda: AllButMe(FULL, "mean", "align", 0.5),
    "abm median": lambda: AllButMe(FULL, "median", "align", 0.5),
}


class Unreadable:
    """What no reader is prepared for."""

    def __getattr__(self, name):
        raise ZeroDivisionError(name)


def like(value, dtype):
    return {"own": {name: np.full(shape, value, dtype) for name, shape in FULL.items()}}


ANSWERS = {  # arrays, and what else is said
    "nothing": ({}, {}),
    "float64": (like(1e300, np.float64), {}),
    "float16": (like(6e4, np.float16), {}),
    "longdouble": (like(1, np.longdouble), {}),
    "largest float32": (like(3e38, np.float32), {}),
    "objects": (like(None, object), {}),
    "words": (like("a", "U4"), {}),
    "lists": ({"own": {name: [[0.0]] for name in FULL}}, {}),
    "a state that is none": ({"own": 5}, {}),
    "arrays that are none": (None, {}),
    "an array that can't be read": ({"own": {name: Unreadable() for name in FULL}}, {}),
    "settings that are none": (like(0, np.float32), None),
    "a name that is no text": ({"own": {7: np.zeros(3, np.float32)}}, {}),
}


def hostile(run, changed, kinds=("train",), client=1):
    """Have a client of a run answer as `changed` makes its honest answers, to messages of these kinds."""
    honest = run.grid.clients[client + 1]

    def answers(message, memory):
        made = honest(message, memory)
        return changed(made) if message.kind in kinds else made

    run.grid.clients[client + 1] = answers
    return run


def is_sound(run) -> bool:
    states = [*run.strategy.results().values(), *run.strategy.saved().values()]
    json.dumps([r.to_json() for r in run.course.rounds], allow_nan=False)
    return all(np.isfinite(array).all() for state in states for array in state.values())


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("answer", ANSWERS)
def test_whatever_a_client_sends_costs_that_client_its_round_alone(name, answer):
    arrays, said = ANSWERS[answer]

    def changed(made):
        return Answer(arrays, said if said is None else {**made.config, **said})

    run = hostile(federation(STRATEGIES[name](), rounds=2, deadline=5.0), changed)
    rounds = run.run().rounds
    assert [sorted(r.updates) for r in rounds] == [[0, 2, 3]] * 2 and all(1 in r.faults for r in rounds)
    assert is_sound(run)


@pytest.mark.parametrize(
    "said",
    [
        {"loss": float("inf"), "seconds": "1e999", "mix": float("-inf"), "accuracy": 10**400},
        {"by_task": [float("inf")] * 100_000, "before": []},
        {"by_task": [[], {}, "x"]},
    ],
    ids=["infinite", "long", "nested"],
)
def test_what_a_client_says_of_itself_is_finite_and_short_or_not_taken(said):
    run = hostile(federation(FedAvg(FULL), rounds=2), lambda made: replace(made, config={**made.config, **said}))
    rounds = run.run().rounds
    assert is_sound(run) and len(json.dumps(rounds[0].to_json())) < 10_000


def test_an_error_of_a_megabyte_is_a_sentence_in_the_course():
    def raises(made):
        raise RuntimeError("x" * 1_000_000)

    rounds = hostile(federation(FedAvg(FULL), rounds=1), raises).run().rounds
    assert len(rounds[0].faults[1]) <= 500


def test_a_client_counts_for_what_it_joined_with_and_for_no_more_than_is_declared():
    def claims(made):
        return replace(made, config={**made.config, "examples": 1e12})

    fair = federation(FedAvg(FULL), rounds=3, examples=24)
    fair.run()
    for kinds in (("train",), ("join",), ("join", "train")):
        run = hostile(federation(FedAvg(FULL), rounds=3, examples=24), claims, kinds)
        run.run()
        for name, array in fair.strategy.results()["global"].items():
            np.testing.assert_array_equal(run.strategy.results()["global"][name], array)


@pytest.mark.parametrize("clients", [4, 80])
def test_no_count_gives_a_client_weight_in_a_median(clients):
    strategy = AllButMe({"w": (3,)}, "median", "project", 0.5)
    strategy.begin({"w": np.zeros(3, np.float32)})
    draw = np.random.default_rng(0)
    sent = {k: TrainedState({"w": (1 + 0.01 * draw.standard_normal(3)).astype(np.float32)}, 24) for k in range(clients)}
    sent[1] = TrainedState({"w": np.full(3, 1e6, np.float32)}, 1e12)
    strategy.aggregate(1, sent)
    assert np.abs(strategy.payload(0, 2, 1).arrays["others"]["w"] - 1).max() < 0.1


@pytest.mark.parametrize("number", [4, 10**300, -1, "x"])
def test_a_client_that_the_declaration_does_not_have_does_not_join(number):
    run = hostile(
        federation(FedAvg(FULL), rounds=1, clients=5, partitions=4),
        lambda made: replace(made, config={**made.config, "client": number}),
        ("join",),
        4,
    )
    run.terms = replace(run.terms, clients=4)
    assert sorted(run.run().rounds[0].updates) == [0, 1, 2, 3]


KEYS = ["", "zz", "00" * 31, "00" * 32, "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800", "first"]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_others_can_not_use_is_left_out_when_it_joins_and_sums_go_on(key):
    pytest.importorskip("cryptography")
    run = federation(SecureSum(FULL, all_but_me=False, mix=None), rounds=2, clients=4)
    run.terms = replace(run.terms, clients=3)
    public = {}

    def told(made):
        public["first"] = made.config["public"]
        return made

    def poisoned(made):
        return replace(made, config={**made.config, "public": public["first"] if key == "first" else key})

    hostile(run, told, ("join",), 0)
    hostile(run, poisoned, ("join",), 3)
    run.grid.clients = dict(sorted(run.grid.clients.items()))
    course = run.run()
    assert [sorted(r.updates) for r in course.rounds] == [[0, 1, 2]] * 2
    assert "key for masks" in course.rounds[0].faults[3]


@pytest.mark.parametrize("arrays", [None, {"masked": 5}, {"masked": {"sum": [0]}}, {"masked": {"sum": Unreadable()}}])
def test_whatever_is_sent_in_place_of_a_masked_state_costs_that_client_its_round_alone(arrays):
    pytest.importorskip("cryptography")
    run = federation(SecureSum(FULL, all_but_me=False, mix=None), rounds=1, clients=4)
    rounds = hostile(run, lambda made: Answer(arrays, made.config), ("masked",)).run().rounds
    assert sorted(rounds[0].updates) == [0, 2, 3] and 1 in rounds[0].faults and is_sound(run)


class Letter:
    """A letter of Flower's by what our grid reads of it."""

    def __init__(self, content, to="1"):
        self.content, self.metadata = content, SimpleNamespace(reply_to_message_id=to)

    def has_error(self):
        return False


def test_a_letter_that_can_not_be_read_is_its_clients_error():
    flwr = pytest.importorskip("flwr.app")

    def arrays(**fields):
        array = flwr.Array(**{"dtype": "float32", "shape": (1,), "stype": "numpy.ndarray", "data": b"", **fields})
        return flwr.ArrayRecord.from_array_dict({"m.A": array})

    config = flwr.ConfigRecord({"number": 1})
    contents = (
        {},
        {"effc.config": flwr.MetricRecord({"a": 1}), "effc.arrays.own": config},
        {"effc.config": config, "effc.arrays.own": arrays(data=b"\x93NUMPY junk")},
        {"effc.config": config, "effc.arrays.own": arrays(data=b"\x80\x04N.", dtype="object")},
        {"effc.config": config, "effc.arrays.own": arrays(stype="else")},
    )
    for content in contents:
        letter = Letter(flwr.RecordDict(content))
        letters = SimpleNamespace(
            push_messages=lambda messages: [str(n) for n, _ in enumerate(messages, 1)],
            pull_messages=lambda ids, letter=letter: [letter, letter, Letter({}, "9")],
        )
        grid = FlowerGrid(letters)
        grid.nodes["1"] = 5
        (reply,) = grid.pull_messages(["1"])  # twice, and of a message that nobody sent, it is not taken
        assert (reply.node, reply.to) == (5, "1") and "can't be read" in reply.error


# -- hostile servers -------------------------------------------------------------------------------------------

BOUNDS = Bounds(FULL, clients=4, deadline=600.0)
HONEST = {"base": "a" * 64, "deadline": 20.0, "seed": 0, "rounds": 4}
BIG = 65_536
ASKED = {
    "an adapter of a huge rank": ({"rank": BIG}, {}),
    "a rank of nothing": ({"rank": 0}, {}),
    "a rank in words": ({"rank": "x"}, {}),
    "a deadline that never comes": ({"deadline": 1e300}, {}),
    "a deadline that is no number": ({"deadline": float("nan")}, {}),
    "a deadline in the past": ({"deadline": -1.0}, {}),
    "no rounds": ({"rounds": 0}, {}),
    "more of the others than all": ({"mix": 5.0, "way": "align"}, {}),
    "a way that is none": ({"mix": 0.5, "way": "sideways"}, {}),
    "more clients than there are": ({"among": 10**9}, {}),
    "a stack of a huge rank": (
        {"rank": 4},
        {"merge.1": {"m.A": np.zeros((BIG, 8), np.float32), "m.B": np.zeros((6, BIG), np.float32)}},
    ),
    "a stack of another module": ({"rank": 4}, {"merge.1": {"n.A": np.zeros((4, 8), np.float32)}}),
    "a stack whose product is no number": (
        {"rank": 4},
        {"merge.1": {"m.A": np.full((4, 8), 3e38, np.float32), "m.B": np.full((6, 4), 3e38, np.float32)}},
    ),
    "a state of other dtypes": ({}, {"global": {n: np.full(s, 1e300) for n, s in FULL.items()}}),
    "a state of NaN": ({}, {"global": {n: np.full(s, np.nan, np.float32) for n, s in FULL.items()}}),
    "a state of other shapes": ({}, {"global": {n: np.zeros((*s, 1), np.float32) for n, s in FULL.items()}}),
}


@pytest.mark.parametrize("asked", ASKED)
def test_a_client_refuses_what_no_honest_server_asks_before_anything_is_computed(asked):
    config, arrays = ASKED[asked]
    client, memory = Participant(0, Regression(0), bounds=BOUNDS), {}
    started = time.monotonic()
    with pytest.raises(Reject) as refused:
        client(Message(1, "train", 1, arrays, {**HONEST, **config}), memory)
    assert refused.value.diagnostics[0].slug == "client-refuses"
    assert not memory and time.monotonic() - started < 1


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_an_honest_server_asks_lies_within_the_bounds(name):
    run = federation(STRATEGIES[name](), rounds=4)
    for client in run.grid.clients.values():
        client.bounds = BOUNDS
    assert not any(r.faults for r in run.run().rounds) and RANK == 4


def test_a_deadline_is_a_day_at_most_unless_the_declaration_has_a_longer_one():
    assert require_deadline_s({}, 600.0) == 600.0 and require_deadline_s({"deadline": DAY}, 600.0) == DAY
    assert require_deadline_s({"deadline": 3 * DAY}, 4 * DAY) == 3 * DAY
    for seconds in (2 * DAY, float("inf"), True, "60"):
        with pytest.raises(Reject):
            require_deadline_s({"deadline": seconds}, 600.0)

"""Clients that learn classes: a head over whole rows is trained along, sent, put together and written with the rest."""

import json
import shutil

import numpy as np
import pytest
import torch
from effc.compiler.apps.federation.app import PACKAGE
from effc.compiler.apps.federation.checkpoint import Checkpoint
from effc.compiler.apps.federation.client_host import ClientHost, cut_model_and_attach_slots
from effc.compiler.apps.federation.declaration import make_federation, make_strategy, read_declaration
from effc.compiler.apps.federation.grid import LocalGrid
from effc.compiler.apps.federation.low_rank import weight_update_of_adapter
from effc.compiler.apps.federation.outcomes import read_state
from effc.compiler.apps.federation.products import PaddedAverage, StackedAverage, TruncatedAverage
from effc.compiler.apps.federation.results import write_results
from effc.compiler.apps.federation.simulation import simulate_federation
from effc.compiler.apps.federation.state import state_fault
from effc.compiler.apps.federation.strategy import TrainedState
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertForSequenceClassification

from tests import worlds
from tests.compiler.apps.federation.states import state_hash

pytest.importorskip("peft")

HEAD = {"classifier.weight", "classifier.bias"}
RANKED, UNEQUAL = ("stack", "svd", "hetlora"), (1, 2, 2)
TEXTS = [(f"{a}{b}{'x' * n}", "up" if a < "m" else "down") for a in "abcdnopq" for b in "efgh" for n in (0, 3)]
RECIPE = """effspec 1
model base = hf("./m")
data words = labels("train.jsonl", classes: ["down", "up"], length: 8)
pipeline shared(base) {{ }}
emit shared {{
  flower("fed", data: words, clients: 3, rounds: 2, steps: 8, batch: 8, hold: 25%, lr: 2e-2, {more})
}}
"""


def compiled(folder, more):
    (folder / "fed.effspec").write_text(RECIPE.format(more=more))
    (result,) = api.compile(folder / "fed.effspec", out=folder / "out", cache_dir=folder / "cache", force=True)
    path = result.artifacts[0].path
    return path, read_declaration(path / PACKAGE / "federation.json")


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    worlds.classifier(folder / "m")
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": t, "label": c}) for t, c in TEXTS))
    return folder, *compiled(folder, "strategy: ffa, rank: 2")


@pytest.mark.parametrize("strategy", ["ffa", "stack", "fedavg", "svd", "hetlora"])
@pytest.mark.slow
def test_a_head_is_sent_averaged_written_and_read_again(app, tmp_path, strategy, monkeypatch):
    home, path, told = app
    said, sent = told.with_changes(strategy=strategy, ranks=UNEQUAL if strategy in RANKED else ()), {}
    made = heard(said, path, home, tmp_path, sent, monkeypatch)
    first, last = made.course.rounds[0], made.course.rounds[-1]
    assert last.loss < np.mean([t.before for t in first.updates.values()])
    (state,) = made.strategy.results().values()
    assert {name for name in state if not name.endswith((".A", ".B"))} == HEAD
    weights = {k: one.examples for k, one in sent.items()}
    for name in HEAD:
        parts = [weights[k] * one.state[name].astype(np.float64) for k, one in sent.items()]
        np.testing.assert_allclose(state[name], sum(parts) / sum(weights.values()), atol=1e-6)
    names = set(sent[0].state)
    assert names >= HEAD and any(n.endswith(".A") for n in names) == (strategy != "ffa")
    write_results(made.strategy.results(), made.course, said, tmp_path / "result")
    assert state_hash(read_state(tmp_path / "result" / "global", said)) == state_hash(state)
    assert torch.allclose(by_peft(home, tmp_path / "result" / "global"), by_us(said, path, state), atol=1e-5)


def heard(said, path, home, tmp_path, sent, monkeypatch):
    """A run that leaves in `sent` what came in its last round."""
    kind = type(make_strategy(said))
    take = kind.aggregate

    def take_and_tell(self, number, replies):
        sent.clear()
        sent.update(replies)
        take(self, number, replies)

    monkeypatch.setattr(kind, "aggregate", take_and_tell)
    return simulate_federation(said, path / said.folder, home, Settings(tmp_path / "cache"))


IDS = torch.tensor([[5, 6, 7, 8], [9, 4, 6, 11]])


def by_peft(home, folder):
    from peft import PeftModel

    base = BertForSequenceClassification.from_pretrained(home / "m").eval()
    with torch.no_grad():
        return PeftModel.from_pretrained(base, folder).eval()(IDS).logits


def by_us(said, path, state):
    model = BertForSequenceClassification.from_pretrained(path / said.folder).eval()
    with cut_model_and_attach_slots(model, said) as slots, torch.no_grad():
        slots.load_state(state, {})
        return slots.model.eval()(IDS).logits


@pytest.mark.slow
def test_a_stack_goes_on_from_the_heads_mean_and_merges_what_was_learned(app, tmp_path):
    home, path, told = app
    said = told.with_changes(strategy="stack")
    made = simulate_federation(said, path / said.folder, home, Settings(tmp_path / "cache"))
    with ClientHost(said, path / said.folder, home, Settings(tmp_path / "cache")).participants([0]) as (client,):
        learner = client.learner
        found = learner.evaluate(made.strategy.results()["global"], {})
    first = made.course.rounds[0].updates[0]
    assert found[0] < first.before  # as peft would run it: one adapter of the sum of all ranks, and the head


@pytest.mark.parametrize("strategy", RANKED)
@pytest.mark.slow
def test_a_federation_of_unequal_ranks_with_a_head_goes_on_to_the_same_bits(app, tmp_path, strategy):
    home, path, declared = app
    declared = declared.with_changes(strategy=strategy, ranks=UNEQUAL)
    host = ClientHost(declared, path / declared.folder, home, Settings(tmp_path / "cache"))

    def state_after(rounds, checkpoint):
        terms = declared.with_changes(rounds=rounds)
        with host.participants([0, 1, 2]) as clients:  # new nodes each time, which remember nothing
            run = make_federation(terms, LocalGrid(clients), checkpoint, lambda round_: None)
            run.run()
        return state_hash(run.strategy.results()["global"])

    whole = state_after(2, None)
    assert state_after(1, Checkpoint(tmp_path / "run", "run")) != whole
    assert state_after(2, Checkpoint(tmp_path / "run", "run")) == whole


@pytest.mark.parametrize("strategy", RANKED)
@pytest.mark.slow
def test_unequal_ranks_over_classes_compile_and_a_client_that_sends_no_head_is_left_out(app, tmp_path, strategy):
    shutil.copytree(app[0] / "m", tmp_path / "m")
    shutil.copy(app[0] / "train.jsonl", tmp_path)
    _, declared = compiled(tmp_path, f"strategy: {strategy}, ranks: [1, 2, 2]")
    assert declared.ranks == UNEQUAL and set(declared.full) >= HEAD
    required = make_strategy(declared).required_shapes(0)
    state = {name: np.zeros(shape, np.float32) for name, shape in required.items()}
    assert state_fault(state, required) == ""
    without = {name: array for name, array in state.items() if name not in HEAD}
    assert state_fault(without, required) == "`classifier.bias` is missing"
    wide = state | {"classifier.weight": np.zeros((3, 3), np.float32)}
    assert "`classifier.weight` is (3, 3)" in state_fault(wide, required)


FULL = {"q.A": (3, 5), "q.B": (4, 3), "head.weight": (2, 4), "head.bias": (2,)}
KINDS = {
    "stack": lambda ranks: StackedAverage(FULL, 16.0, ranks),
    "svd": lambda ranks: TruncatedAverage(FULL, 16.0, ranks),
    "hetlora": lambda ranks: PaddedAverage(FULL, 16.0, ranks),
}


def trained_states(strategy, examples, seed):
    draw = np.random.default_rng(seed)
    return {
        client: TrainedState(
            {n: draw.standard_normal(s).astype(np.float32) for n, s in strategy.required_shapes(client).items()}, count
        )
        for client, count in examples.items()
    }


@pytest.mark.parametrize("kind", KINDS)
@given(
    ranks=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    counts=st.lists(st.integers(1, 50), min_size=4, max_size=4),
    seed=st.integers(0, 999),
)
def test_a_head_is_the_mean_by_examples_whatever_the_ranks_and_updates_are(kind, ranks, counts, seed):
    strategy = KINDS[kind](dict(enumerate(ranks)))
    strategy.begin({name: np.zeros(shape, np.float32) for name, shape in FULL.items()})
    sent = trained_states(strategy, dict(enumerate(counts[: len(ranks)])), seed)
    strategy.aggregate(1, sent)
    state = strategy.results()["global"]
    for name in ("head.weight", "head.bias"):
        expected = np.average(
            [s.state[name] for s in sent.values()], axis=0, weights=[s.examples for s in sent.values()]
        )
        np.testing.assert_allclose(state[name], expected, atol=1e-5)  # float32 sums of numbers about 1
    again = KINDS[kind](dict(enumerate(ranks)))
    again.restore(strategy.saved())
    for client in range(len(ranks)):
        resumed, before = again.payload(client, 2, None), strategy.payload(client, 2, None)
        assert resumed.config == before.config
        assert {use: state_hash(s) for use, s in resumed.arrays.items()} == {
            use: state_hash(s) for use, s in before.arrays.items()
        }


@pytest.mark.parametrize("kind", KINDS)
def test_a_federation_of_one_client_of_the_full_rank_gives_what_that_client_learned(kind):
    strategy = KINDS[kind]({0: 3})
    strategy.begin({name: np.zeros(shape, np.float32) for name, shape in FULL.items()})
    (alone,) = trained_states(strategy, {0: 7}, 1).values()
    strategy.aggregate(1, {0: alone})
    state = strategy.results()["global"]
    np.testing.assert_allclose(
        weight_update_of_adapter(state, "q", 16.0), weight_update_of_adapter(alone.state, "q", 16.0), atol=1e-4
    )  # float32 factors
    assert all((state[name] == alone.state[name]).all() for name in ("head.weight", "head.bias"))

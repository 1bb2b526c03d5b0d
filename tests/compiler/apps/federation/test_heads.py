"""Clients that learn classes: a head over whole rows is trained along, sent, put together and written with the rest."""

import json

import numpy as np
import pytest
import torch
from effc.compiler.apps.federation.app import PACKAGE
from effc.compiler.apps.federation.client_host import ClientHost, attach_slots
from effc.compiler.apps.federation.declaration import read_declaration
from effc.compiler.apps.federation.outcomes import read_state
from effc.compiler.apps.federation.results import write_results
from effc.compiler.apps.federation.simulation import simulate_federation
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.dsl.syntax.diagnostics import Reject
from transformers import BertForSequenceClassification

from tests import worlds
from tests.compiler.apps.federation.states import state_hash

pytest.importorskip("peft")

HEAD = {"classifier.weight", "classifier.bias"}
TEXTS = [(f"{a}{b}{'x' * n}", "up" if a < "m" else "down") for a in "abcdnopq" for b in "efgh" for n in (0, 3)]
RECIPE = """effspec 1
model base = hf("./m")
data words = labels("train.jsonl", classes: ["down", "up"], length: 8)
pipeline shared(base) {{ }}
emit shared {{
  flower("fed", data: words, clients: 3, rounds: 2, steps: 8, batch: 8, hold: 25%, lr: 2e-2, rank: 2, {more})
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
    return folder, *compiled(folder, "strategy: ffa")


@pytest.mark.parametrize("strategy", ["ffa", "stack", "fedavg"])
def test_a_head_is_sent_averaged_written_and_read_again(app, tmp_path, strategy, monkeypatch):
    home, path, told = app
    said, sent = told.with_changes(strategy=strategy), {}
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
    from effc.compiler.apps.federation.averaging import FedAvg, FrozenA
    from effc.compiler.apps.federation.products import StackedAverage

    kind = {"ffa": FrozenA, "stack": StackedAverage, "fedavg": FedAvg}[said.strategy]
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
    with attach_slots(model, said) as slots, torch.no_grad():
        slots.load_state(state, {})
        return slots.model.eval()(IDS).logits


def test_a_stack_goes_on_from_the_heads_mean_and_merges_what_was_learned(app, tmp_path):
    home, path, told = app
    said = told.with_changes(strategy="stack")
    made = simulate_federation(said, path / said.folder, home, Settings(tmp_path / "cache"))
    with ClientHost(said, path / said.folder, home, Settings(tmp_path / "cache")).participants([0]) as (client,):
        learner = client.learner
        found = learner.evaluate(made.strategy.results()["global"], {})
    first = made.course.rounds[0].updates[0]
    assert found[0] < first.before  # as peft would run it: one adapter of the sum of all ranks, and the head


@pytest.mark.parametrize("strategy", ["svd", "hetlora"])
def test_strategies_that_know_adapters_alone_refuse_classes_by_name(app, strategy):
    home = app[0]
    with pytest.raises(Reject) as refused:
        compiled(home, f"strategy: {strategy}")
    (wrong,) = refused.value.diagnostics
    assert wrong.slug == "unfit-strategy" and f"`strategy: {strategy}`" in wrong.message and wrong.span is not None

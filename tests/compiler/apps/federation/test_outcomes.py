"""What a federation gave, judged: by the recipe's bounds that speak of it, on every state that it left."""

import json
from pathlib import Path

import numpy as np
import pytest
from effc.compiler.apps.federation.app import PACKAGE
from effc.compiler.apps.federation.declaration import read_declaration
from effc.compiler.apps.federation.outcomes import models_with_trained_states, read_state
from effc.compiler.apps.federation.results import MARK, write_results
from effc.compiler.apps.federation.simulation import simulate_federation
from effc.compiler.apps.federation.table import round_line
from effc.compiler.apps.federation.targets.flower import Flower
from effc.compiler.artifacts.manifest import read_manifest
from effc.compiler.core.quantity import size_text
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.compiler.driver.judging import retest
from effc.dsl.syntax.diagnostics import Reject

from tests.compiler.apps.federation.states import state_hash

pytestmark = pytest.mark.slow

pytest.importorskip("peft")

RECIPE = """effspec 1
model base = zoo("tiny-llama")
data words = {data}
data judged = {judged}
pipeline shared(base) {{ {steps} }}
expect shared {{
  params <= 1.1 * base
  {bound} in flower
}}
emit shared {{ flower("fed", data: words, clients: 3, rounds: 2, steps: 4, batch: 4, hold: 25%, lr: 1e-2, {more}) }}
"""
TEXT = 'text("ledger.txt", samples: 24, length: 24, seed: 7)'
PAIRS = 'pairs("p.jsonl", join: " ", length: 24)'


def compiled(folder: Path, more: str, bound="perplexity(judged) <= 0.9 * base", data=TEXT, steps=""):
    folder.mkdir(exist_ok=True)
    goods = ("apples", "nails", "ropes", "candles", "jars")
    for name, pairs, first in (("ledger.txt", "p.jsonl", 0), ("judged.txt", "q.jsonl", 31)):  # like text, other rows
        lines = [f"Ann pays {n * 7 % 13} coins for {goods[n % 5]}." for n in range(first, first + 300)]
        (folder / name).write_text("\n".join(lines))
        records = [{"prompt": f"Ann pays {n % 7} coins for", "answer": goods[n % 5]} for n in range(first, first + 48)]
        (folder / pairs).write_text("".join(json.dumps(r) + "\n" for r in records))
    judged = data.replace("ledger", "judged").replace("p.jsonl", "q.jsonl")
    recipe = RECIPE.format(bound=bound, data=data, judged=judged, steps=steps, more=more)
    (folder / "r.effspec").write_text(recipe)
    (result,) = api.compile(folder / "r.effspec", out=folder / "out", cache_dir=folder / "cache", force=True)
    return result.artifacts[0].path, result


def ran(path: Path):
    declared = read_declaration(path / PACKAGE / "federation.json")
    run = simulate_federation(declared, path / declared.folder, path.parents[1], Settings(path.parents[1] / "cache"))
    write_results(run.strategy.results(), run.course, declared, path.with_name("fed-result"), path)
    return run, declared


def judged(path: Path):
    file, given = retest.recipe_and_params(path, None)
    session = api.open_session(file, settings=Settings(path.parents[1] / "cache"), set=given)
    return retest.remeasure_artifact(path, session, api.plan_all_pipelines(session))[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A federation of three states, compiled and run."""
    path, result = compiled(tmp_path_factory.mktemp("alone") / "x", 'strategy: alone, rank: 2, on: "*.{q,v}_proj"')
    with pytest.raises(Reject) as refused:
        judged(path)
    return path, result, refused.value.diagnostics[0], *ran(path)


def test_a_bound_in_flower_waits_for_the_run_and_testing_before_it_is_refused(alone):
    path, _, refused, _, _ = alone
    said = read_manifest(path).expectations
    assert [one.outcome for one in said] == ["holds", "skipped"]
    assert refused.slug == "not-run" and f"effc run {path}" in refused.help


def test_every_state_is_judged_and_the_worst_of_them_decides(alone):
    path = alone[0]
    made = judged(path)
    assert made.passed and {o.state for o in made.outcomes} == {"ok"}
    values = {m.metric: m.compiled for m in made.compared.measures if m.metric.startswith("perplexity")}
    assert sorted(values) == [f"perplexity(judged) of client-{k}" for k in range(3)]
    assert len(set(values.values())) == 3  # three states, not one three times
    text = (path.parents[1] / "r.effspec").read_text()
    limit = sorted(values.values())[1] / made.outcomes[1].original  # one state is worse
    (path.parents[1] / "s.effspec").write_text(text.replace("0.9 * base", f"{limit:.6f} * base"))
    session = api.open_session(path.parents[1] / "s.effspec", settings=Settings(path.parents[1] / "cache"))
    (missed,) = [
        o for o in retest.remeasure_artifact(path, session, api.plan_all_pipelines(session))[0].outcomes if not o.passed
    ]
    assert missed.where == max(values, key=values.get).removeprefix("perplexity(judged) of ")


def test_states_are_read_back_to_the_bit_and_those_of_another_federation_refused(alone, tmp_path):
    path, _, _, run, declared = alone
    folder = path.with_name("fed-result")
    for name, state in run.strategy.results().items():
        assert state_hash(read_state(folder / name, declared)) == state_hash(state)
    with pytest.raises(Reject) as refused:
        read_state(folder / "client-0", declared.with_changes(full={"m.A": (2, 4), "m.B": (4, 2)}))
    assert refused.value.diagnostics[0].slug == "bad-federation-result"
    body = json.loads((folder / MARK).read_text())
    (folder / MARK).write_text(json.dumps({**body, "identity": "0" * 64}))
    with pytest.raises(Reject, match="another federation"):
        judged(path)
    (folder / MARK).write_text(json.dumps(body))


def test_inspect_draws_the_clients_their_bytes_and_how_it_went(alone):
    path, _, _, run, declared = alone
    text = Flower.summary(path / declared.folder).to_text()
    rows = [line.split() for line in text.splitlines() if line.split()[:1] in (["0"], ["1"], ["2"])]
    sent = size_text(run.course.rounds[-1].updates[0].bytes_up)
    assert [" ".join(row[1:3]) for row in rows[:3]] == [sent] * 3
    assert text.startswith("3 clients train LoRA adapters by alone, 2 rounds") and "ran 2 rounds" in text
    assert round_line(run.course.rounds[-1]) in text
    assert len(Flower.summary(path / declared.folder).to_json()["rounds"]) == 2


@pytest.mark.parametrize(
    ("more", "data", "steps"),
    [
        ("strategy: stack, rank: 2", TEXT, ""),
        ("trains: prompt, tokens: 4", TEXT, ""),
        ("trains: reft, strategy: fedavg", PAIRS, 'e = reft.insert(positions: "f2+l2", rank: 2)'),
    ],
)
@pytest.mark.heavy
def test_whatever_is_trained_comes_back_as_a_model_that_does_what_its_client_saw(more, data, steps, tmp_path):
    path, _ = compiled(tmp_path / "x", more, "perplexity(judged) <= 10 * base", data, steps)
    run, declared = ran(path)
    (outcome,) = [o for o in judged(path).outcomes if o.bound.metric.name == "perplexity"]
    assert outcome.passed and np.log(outcome.value) == pytest.approx(run.course.rounds[-1].loss, abs=1.0)
    file, _ = retest.recipe_and_params(path, None)
    session = api.open_session(file, settings=Settings(path.parents[1] / "cache"))
    (plan,) = api.plan_all_pipelines(session)
    names = [name for name, _ in models_with_trained_states(path, session.context(plan.recipe, plan.pipeline))]
    assert names == ["global"]
    for name, state in run.strategy.results().items():
        assert state_hash(read_state(path.with_name("fed-result") / name, declared)) == state_hash(state)

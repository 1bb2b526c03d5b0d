"""From a recipe to a folder that trains: compile, run, resume, and what is refused."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from effc.compiler import api
from effc.compiler.commands.simulate import is_federation
from effc.compiler.federation.app import PACKAGE
from effc.compiler.federation.checkpoint import Checkpoint
from effc.compiler.federation.declaration import read_declaration, strategy_of
from effc.compiler.federation.grid import LocalGrid
from effc.compiler.federation.place import Place
from effc.compiler.federation.results import write_results
from effc.compiler.federation.rounds import Federation
from effc.compiler.federation.simulation import simulate
from effc.compiler.federation.state import state_hash
from effc.compiler.words.context import Settings
from effc.dsl.diagnostics import Reject

pytest.importorskip("peft")

RECIPE = """effspec 1
model base = zoo("tiny-llama")
data words = text("ledger.txt", samples: 36, length: 32, seed: 7)
pipeline shared(base) {{ }}
emit shared {{ flower("fed", data: words, clients: 3, rounds: 2, steps: 3, batch: 4, on: "model.layers.0.*.{{q,v}}_proj",
  rank: 2, hold: 25%, lr: 1e-2, {more}) }}
"""


def ledger(folder: Path) -> None:
    """A text unlike what the embedded model has read, so that there is something to learn."""
    names, goods = ("Ann", "Bob", "Cid", "Dora"), ("apples", "nails", "ropes", "candles", "jars")
    lines = [f"{names[n % 4]} pays {n * 7 % 13} coins for {n * 5 % 11} {goods[n % 5]}." for n in range(300)]
    (folder / "ledger.txt").write_text("\n".join(lines))


def compiled(folder: Path, more: str = "strategy: fedavg") -> Path:
    """The artifact of a federation of three clients over one layer of the embedded model."""
    ledger(folder)
    (folder / "fed.effspec").write_text(RECIPE.format(more=more))
    (result,) = api.compile(folder / "fed.effspec", out=folder / "out", cache_dir=folder / "cache", force=True)
    return result.artifacts[0].path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    return compiled(tmp_path_factory.mktemp("federation"))


def declared(artifact: Path, **changes):
    return read_declaration(artifact / PACKAGE / "federation.json").with_changes(**changes)


def run(artifact: Path, tmp_path: Path, **changes):
    said = declared(artifact, **changes)
    return simulate(said, artifact / said.folder, artifact.parents[1], Settings(tmp_path / "cache"))


def hashes(run) -> dict[str, str]:
    return {name: state_hash(state) for name, state in run.strategy.results().items()}


def test_the_folder_is_an_app_and_its_model_loads(artifact):
    names = {f.relative_to(artifact).as_posix() for f in artifact.rglob("*") if f.is_file()}
    assert {
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "fedapp/__init__.py",
        "fedapp/server_app.py",
        "fedapp/client_app.py",
        "fedapp/federation.json",
        "model/config.json",
        "manifest.json",
    } <= names
    import tomllib

    project = tomllib.loads((artifact / "pyproject.toml").read_text())
    assert project["tool"]["flwr"]["app"]["components"] == {
        "serverapp": "fedapp.server_app:app",
        "clientapp": "fedapp.client_app:app",
    }
    for name in ("server_app", "client_app"):
        compile((artifact / "fedapp" / f"{name}.py").read_text(), name, "exec")
    assert is_federation(str(artifact))
    assert api.load(artifact).config.hidden_size == 128


def test_the_page_names_every_command_and_the_models_hash(artifact):
    page = (artifact / "README.md").read_text()
    assert declared(artifact).base in page
    for command in (
        "effc run .",
        "flwr run .",
        "flower-superlink",
        "flower-supernode",
        "FLWR_TELEMETRY_ENABLED=0",
        "--max-retries",
        "finished:completed",
    ):
        assert command in page


def test_clients_together_learn_and_a_killed_run_goes_on_to_the_same_bits(artifact, tmp_path):
    whole = run(artifact, tmp_path / "one")
    assert whole.course.rounds[-1].loss < np.mean([t.before for t in whole.course.rounds[0].turns.values()])
    said, place = declared(artifact), None
    checkpoint = Checkpoint(tmp_path / "two" / "cache" / "federations" / said.identity, said.identity)
    place = Place(said, artifact / "model", artifact.parents[1], Settings(tmp_path / "two" / "cache"))
    with place.seats([0, 1, 2]) as clients:  # a server that is gone after its first round
        Federation(LocalGrid(clients), strategy_of(said), said.with_changes(rounds=1).terms(), checkpoint).run()
    again = run(artifact, tmp_path / "two")
    assert hashes(again) == hashes(whole)
    assert not (tmp_path / "two" / "cache" / "federations" / said.identity).exists()  # nothing is left to go on with


def test_training_leaves_the_model_as_it_was(artifact, tmp_path):
    said = declared(artifact, strategy="stack")
    place = Place(said, artifact / "model", artifact.parents[1], Settings(tmp_path / "cache"))
    with place.seats([0, 1, 2]) as clients:
        model = clients[0].learner.slots.model
        names = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" not in n}
        Federation(LocalGrid(clients), strategy_of(said), said.terms()).run()
    held = dict(model.named_parameters())
    assert all(torch.equal(p, held[n.replace(".base_layer", "")]) for n, p in names.items())


@pytest.mark.parametrize("strategy", ["ffa", "stack", "svd", "hetlora", "abm"])
def test_every_strategy_runs_over_a_model(artifact, tmp_path, strategy):
    ranks = (1, 2, 2) if strategy in ("stack", "svd", "hetlora") else ()
    made = run(artifact, tmp_path, strategy=strategy, ranks=ranks)
    first, last = made.course.rounds[0], made.course.rounds[-1]
    assert sorted(last.turns) == [0, 1, 2] and not last.faults
    assert last.loss < np.mean([t.before for t in first.turns.values()])


@pytest.mark.parametrize(
    ("trains", "shapes"),
    [("prompt", {"prompt": (4, 128)}), ("full", {"model.layers.0.mlp.up_proj.weight": (384, 128)})],
)
def test_prompts_and_weights_are_trained_together_too(artifact, tmp_path, trains, shapes):
    made = run(artifact, tmp_path, trains=trains, full=shapes, lr=5e-3)
    first, last = made.course.rounds[0], made.course.rounds[-1]
    assert last.loss < np.mean([t.before for t in first.turns.values()])
    assert {t.bytes_up for t in last.turns.values()} == {4 * math.prod(next(iter(shapes.values())))}


@pytest.mark.parametrize("strategy", ["fedavg", "stack", "abm"])
def test_results_are_adapters_that_peft_loads(artifact, tmp_path, strategy):
    from effc.compiler.rows.forward import nll
    from peft import PeftModel

    made = run(artifact, tmp_path, strategy=strategy)
    write_results(made.strategy.results(), made.course, declared(artifact), tmp_path / "result")
    name = "client-1" if strategy == "abm" else "global"
    model = PeftModel.from_pretrained(api.load(artifact), tmp_path / "result" / name)
    said = declared(artifact, strategy=strategy)
    with Place(said, artifact / "model", artifact.parents[1], Settings(tmp_path / "cache")).seats([1]) as (client,):
        held_out = client.learner.held_out
        wanted = client.learner.loss(made.strategy.results()[name], {})
    nats, tokens = nll(model, held_out.ids)
    assert nats / tokens == pytest.approx(wanted, abs=1e-5)
    assert json.loads((tmp_path / "result" / "federation-result.json").read_text())["rounds"][1]["number"] == 2


def test_a_model_that_was_changed_is_refused_before_anything_runs(artifact, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(artifact / "model", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    with pytest.raises(Reject) as refused:
        simulate(declared(artifact), other, artifact.parents[1], Settings(tmp_path / "cache"))
    assert refused.value.diagnostics[0].slug == "other-federation-base"


@pytest.mark.parametrize(
    ("more", "slug", "says"),
    [
        ("clients: 50", "empty-client", "of 50 would have none"),
        ("split: distinct", "empty-client", "3 clients, 1 data sets"),
        ("trains: prompt, strategy: ffa", "unfit-choices", "`strategy: ffa` puts adapters together"),
        ("strategy: fedavg, ranks: [1, 2, 2]", "unfit-choices", "adapters of one rank"),
        ("strategy: svd, ranks: [1, 2]", "unfit-strategy", "2 ranks for 3 clients"),
        ("strategy: abm, clip: 1.0", "unfit-choices", "one common state"),
        ("noise: 1.0", "unfit-choices", "in units of `clip`"),
        ("strategy: coverage, trains: full", "unfit-choices", "no client has a budget"),
        ("budgets: [100%, 50%, 50%]", "unfit-choices", "sub-networks of several sizes"),
        ("strategy: coverage, trains: full, budgets: [100%, 50%]", "unfit-strategy", "2 budgets for 3 clients"),
        (
            "strategy: coverage, trains: full, budgets: [90%, 50%, 60%]",
            "unfit-strategy",
            "no client has a budget of 100%",
        ),
        ("strategy: abm, secure: true, center: median, way: project", "unfit-choices", "a median needs the states"),
        ("strategy: abm, secure: true", "unfit-choices", "rotations are aligned"),
        ("strategy: svd, secure: true", "unfit-choices", "needs the states"),
        ("trains: reft, strategy: fedavg", "unfit-strategy", "where a prompt ends"),
        ("strategy: abm, mixing: adaptive, hold: 0%", "unfit-strategy", "rows that a client holds back"),
        ("rank: 65", "rank-too-large", "an adapter has rank 65"),
        ("strategy: svd, ranks: [1, 2, 500]", "rank-too-large", "none above 64"),
        ("deadline: 0s", "out-of-range", "more than"),
        ("strategy: coverage, trains: full, budgets: [100%, 150%, 50%]", "out-of-range", "the most is 100%"),
    ],
)
def test_what_can_not_work_is_refused(tmp_path, more, slug, says):
    text = RECIPE
    for name in ("clients", "rank", "hold"):  # said once
        text = re.sub(rf"\b{name}: \S+, ", "", text) if f"{name}: " in more else text
    ledger(tmp_path)
    (tmp_path / "fed.effspec").write_text(text.format(more=more))
    with pytest.raises(Reject) as refused:
        api.compile(tmp_path / "fed.effspec", out=tmp_path / "out", cache_dir=tmp_path / "cache")
    (wrong,) = refused.value.diagnostics
    assert wrong.slug == slug and says in wrong.message
    assert wrong.span is not None
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())

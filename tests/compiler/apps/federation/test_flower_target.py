"""From a recipe to a folder that trains: compile, run, resume, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from effc.compiler.apps.federation.app import PACKAGE
from effc.compiler.apps.federation.checkpoint import Checkpoint
from effc.compiler.apps.federation.client_host import ClientHost
from effc.compiler.apps.federation.declaration import make_strategy, read_declaration
from effc.compiler.apps.federation.grid import LocalGrid
from effc.compiler.apps.federation.personal import MANY
from effc.compiler.apps.federation.results import write_results
from effc.compiler.apps.federation.rounds import Federation
from effc.compiler.apps.federation.secure import LEAST
from effc.compiler.apps.federation.simulation import simulate_federation
from effc.compiler.apps.federation.targets.flower import Flower
from effc.compiler.artifacts.load import target_of_artifact
from effc.compiler.cli.main import main
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.compiler.plugin.registry import Registry
from effc.dsl.checker.rules import Conflict, Unread
from effc.dsl.checker.values import DataRef
from effc.dsl.syntax.diagnostics import Reject

from tests.compiler.apps.federation.states import state_hash

pytest.importorskip("peft")

RECIPE = """effspec 1
model base = zoo("tiny-llama")
data words = text("ledger.txt", samples: 36, length: 32, seed: 7)
pipeline shared(base) {{ }}
emit shared {{ flower("fed", data: words, clients: 3, rounds: 2, steps: 3, batch: 4,
  hold: 25%, lr: 1e-2, {trained}, {more}) }}
"""
ADAPTERS = 'on: "model.layers.0.*.{q,v}_proj", rank: 2'


def savings_table(folder: Path) -> None:
    """A text unlike what the embedded model has read, so that there is something to learn."""
    names, goods = ("Ann", "Bob", "Cid", "Dora"), ("apples", "nails", "ropes", "candles", "jars")
    lines = [f"{names[n % 4]} pays {n * 7 % 13} coins for {n * 5 % 11} {goods[n % 5]}." for n in range(300)]
    (folder / "ledger.txt").write_text("\n".join(lines))


def compiled(folder: Path, more: str = "strategy: fedavg", trained: str = ADAPTERS) -> Path:
    """The artifact of a federation of three clients over one layer of the embedded model, or what is trained of it."""
    savings_table(folder)
    (folder / "fed.effspec").write_text(RECIPE.format(more=more, trained=trained))
    (result,) = api.compile(folder / "fed.effspec", out=folder / "out", cache_dir=folder / "cache", force=True)
    return result.artifacts[0].path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    return compiled(tmp_path_factory.mktemp("federation"))


def declared(artifact: Path, **changes):
    return read_declaration(artifact / PACKAGE / "federation.json").with_changes(**changes)


def run(artifact: Path, tmp_path: Path, **changes):
    said = declared(artifact, **changes)
    return simulate_federation(said, artifact / said.folder, artifact.parents[1], Settings(tmp_path / "cache"))


def hashes(run) -> dict[str, str]:
    return {name: state_hash(state) for name, state in run.strategy.results().items()}


@pytest.mark.slow
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
    assert target_of_artifact(artifact) is Flower
    assert api.load(artifact).config.hidden_size == 128


@pytest.mark.slow
def test_the_page_names_every_command_and_the_models_hash(artifact):
    page = (artifact / "README.md").read_text()
    assert declared(artifact).base in page
    for command in (
        "effc run .",
        "flwr run .",
        "effc federate up .",
        "ssh-keygen -q -t ecdsa -b 384 -N '' -f node0",
        "flower-superlink",
        "flower-supernode",
        "FLWR_TELEMETRY_ENABLED=0",
        "--max-retries",
        "finished:completed",
    ):
        assert command in page


@pytest.mark.slow
def test_the_first_command_of_the_page_works_in_the_folder_that_it_is_written_for(artifact, monkeypatch):
    monkeypatch.setenv("EFFC_CACHE_DIR", str(artifact.parents[1] / "cache"))
    monkeypatch.chdir(artifact)
    assert main(["run", ".", "--no-progress"]) == 0
    assert (artifact.with_name("fed-result") / "global" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_clients_together_learn_and_a_killed_run_goes_on_to_the_same_bits(artifact, tmp_path):
    whole = run(artifact, tmp_path / "one")
    assert whole.course.rounds[-1].loss < np.mean([t.before for t in whole.course.rounds[0].updates.values()])
    said, place = declared(artifact), None
    checkpoint = Checkpoint(tmp_path / "two" / "cache" / "federations" / said.identity, said.identity)
    place = ClientHost(said, artifact / "model", artifact.parents[1], Settings(tmp_path / "two" / "cache"))
    with place.participants([0, 1, 2]) as clients:  # a server that is gone after its first round
        Federation(
            LocalGrid(clients), make_strategy(said), said.with_changes(rounds=1).make_round_terms(), checkpoint
        ).run()
    again = run(artifact, tmp_path / "two")
    assert hashes(again) == hashes(whole)
    assert not (tmp_path / "two" / "cache" / "federations" / said.identity).exists()  # nothing is left to go on with


@pytest.mark.slow
def test_training_leaves_the_model_as_it_was(artifact, tmp_path):
    said = declared(artifact, strategy="stack")
    place = ClientHost(said, artifact / "model", artifact.parents[1], Settings(tmp_path / "cache"))
    with place.participants([0, 1, 2]) as clients:
        model = clients[0].learner.slots.model
        names = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" not in n}
        Federation(LocalGrid(clients), make_strategy(said), said.make_round_terms()).run()
    held = dict(model.named_parameters())
    assert all(torch.equal(p, held[n.replace(".base_layer", "")]) for n, p in names.items())


@pytest.mark.parametrize("strategy", ["ffa", "stack", "svd", "hetlora", "abm"])
@pytest.mark.slow
def test_every_strategy_runs_over_a_model(artifact, tmp_path, strategy):
    ranks = (1, 2, 2) if strategy in ("stack", "svd", "hetlora") else ()
    made = run(artifact, tmp_path, strategy=strategy, ranks=ranks)
    first, last = made.course.rounds[0], made.course.rounds[-1]
    assert sorted(last.updates) == [0, 1, 2] and not last.faults
    assert last.loss < np.mean([t.before for t in first.updates.values()])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trains", "shapes"),
    [("prompt", {"prompt": (4, 128)}), ("full", {"model.layers.0.mlp.up_proj.weight": (384, 128)})],
)
def test_prompts_and_weights_are_trained_together_too(artifact, tmp_path, trains, shapes):
    made = run(artifact, tmp_path, trains=trains, full=shapes, lr=5e-3)
    first, last = made.course.rounds[0], made.course.rounds[-1]
    assert last.loss < np.mean([t.before for t in first.updates.values()])
    assert {t.bytes_up for t in last.updates.values()} == {4 * math.prod(next(iter(shapes.values())))}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "stack", "abm"])
def test_results_are_adapters_that_peft_loads(artifact, tmp_path, strategy):
    from effc.compiler.models.rows.forward import total_nll
    from peft import PeftModel

    made = run(artifact, tmp_path, strategy=strategy)
    write_results(made.strategy.results(), made.course, declared(artifact), tmp_path / "result")
    name = "client-1" if strategy == "abm" else "global"
    model = PeftModel.from_pretrained(api.load(artifact), tmp_path / "result" / name)
    said = declared(artifact, strategy=strategy)
    with ClientHost(said, artifact / "model", artifact.parents[1], Settings(tmp_path / "cache")).participants([1]) as (
        client,
    ):
        held_out = client.learner.held_out
        wanted = client.learner.loss(made.strategy.results()[name], {})
    nats, tokens = total_nll(model, held_out.ids)
    assert nats / tokens == pytest.approx(wanted, abs=1e-5)
    assert json.loads((tmp_path / "result" / "federation-result.json").read_text())["rounds"][1]["number"] == 2


@pytest.mark.slow
def test_a_run_that_nobody_can_finish_ends_with_exit_code_one_and_the_reasons(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EFFC_CACHE_DIR", str(tmp_path / "cache"))
    savings_table(tmp_path)
    wild = 'clients: 2, rounds: 2, steps: 2, lr: 3e38, rank: 2, on: "model.layers.0.*.q_proj"'
    (result,) = api.compile(asked(tmp_path, wild), out=tmp_path / "out", cache_dir=tmp_path / "cache")
    assert main(["run", str(result.artifacts[0].path), "--no-progress"]) == 1
    said = capsys.readouterr().err
    assert (
        "round 1: 0 of 2 clients sent a usable state" in said and "note: client 0: " in said and "; client 1: " in said
    )
    assert not (tmp_path / "out" / "fed-result").exists()


def test_a_model_that_was_changed_is_refused_before_anything_runs(artifact, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(artifact / "model", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    with pytest.raises(Reject) as refused:
        simulate_federation(declared(artifact), other, artifact.parents[1], Settings(tmp_path / "cache"))
    assert refused.value.diagnostics[0].slug == "other-federation-base"


ASKED = """effspec 1
model base = zoo("tiny-llama")
data words = text("ledger.txt", samples: 36, length: 32, seed: 7)
pipeline shared(base) {{ }}
emit shared {{ flower("fed", data: words, {more}) }}
"""


def asked(folder: Path, more: str) -> Path:
    """A recipe that says these things of the target and leaves the rest out: four clients, say."""
    (folder / "fed.effspec").write_text(ASKED.format(more=more))
    return folder / "fed.effspec"


@pytest.mark.parametrize(
    ("more", "blamed", "says"),
    [
        ("trains: prompt, strategy: ffa", "ffa", "put adapters together"),
        ("strategy: fedavg, ranks: [1, 2, 2, 4]", "[1", "adapters of one rank"),
        ("strategy: svd, ranks: [1, 2]", "[1", "not as many as clients"),
        ("strategy: abm, clip: 1.0", "1.0", "one common state"),
        ("noise: 1.0", "1.0", "in units of `clip`"),
        ("protects: rows", "rows", "by `clip`, which is 0"),
        ("strategy: coverage, trains: full", "coverage", "no client has a budget"),
        ("budgets: [100%, 50%, 50%, 50%]", "[100%", "sub-networks of several sizes"),
        ("strategy: coverage, trains: full, budgets: [100%, 50%]", "[100%", "not as many as clients"),
        ("strategy: coverage, trains: full, clients: 2, budgets: [90%, 50%]", "[90%", "a budget of 100%"),
        ("strategy: abm, secure: true, center: median, way: project", "true", "a median needs the states"),
        ("strategy: abm, secure: true", "true", "rotations are aligned"),
        ("strategy: svd, secure: true", "true", "needs the states"),
        ("clients: 2, secure: true", "true", "fewer than three states"),
        ("strategy: abm, mixing: adaptive, hold: 0%", "adaptive", "rows that a client holds back"),
        ("strategy: abm, clients: 1", "abm", "one client has no others"),
        ("strategy: abm, center: median, clients: 2", "median", "what one other client sent"),
        ("strategy: abm, trains: reft, way: function, clients: 65", "function", "grows with their square"),
        ("share: 1%", "1%", "is nobody"),
        ("split: distinct", "distinct", "not as many as clients"),
        ("stream: true, rounds: 2", "true", "has one task"),
        ('trains: full, on: "*"', '"*"', "none are trained"),
        ("deadline: 0s", "0s", "more than"),
        ("strategy: coverage, trains: full, clients: 2, budgets: [100%, 150%]", "150%", "the most is 100%"),
    ],
)
def test_what_can_not_go_together_is_told_by_check_where_it_is_written(tmp_path, more, blamed, says):
    recipe = asked(tmp_path, more)
    if "trains: reft" in more:
        recipe.write_text(recipe.read_text().replace("shared(base) { }", "shared(base) { e = reft.insert() }"))
    wrong = api.check(recipe, cache_dir=tmp_path / "cache").diagnostics[0]
    assert wrong.slug in ("unfit-choices", "out-of-range") and says in wrong.message
    assert wrong.span.source.text[wrong.span.start :].startswith(blamed)


UNREAD = {
    "rank": "trains: full, rank: 4",
    "alpha": "trains: full, alpha: 4",
    "tokens": "tokens: 4",
    "top": "top: 4",
    "mix": "mix: 50%",
    "mixing": "mixing: adaptive",
    "center": "center: median",
    "way": "way: project",
    "beta": "beta: 0.5",
    "hold": "trains: index, strategy: search, hold: 10%",
    "share": "trains: index, strategy: search, share: 50%",
    "steps": "trains: index, strategy: search, steps: 4",
    "batch": "trains: index, strategy: search, batch: 4",
    "lr": "trains: index, strategy: search, lr: 0.1",
    "counted": "counted: all",
    "counts": "counts: flops",
    "allocation": "allocation: sandwich",
    "protects": "protects: clients",
    "delta": "delta: 0.01",
}


@pytest.mark.parametrize("name", sorted(UNREAD))
def test_a_parameter_that_nothing_reads_is_refused_where_it_is_written(tmp_path, name):
    (wrong,) = api.check(asked(tmp_path, UNREAD[name]), cache_dir=tmp_path / "cache").diagnostics
    assert wrong.slug == "unfit-choices" and wrong.message.startswith(f"nothing reads `{name}` here")
    written = wrong.span.source.text
    assert written[: wrong.span.start].endswith(f"{name}: ")


def test_a_number_that_nobody_wrote_is_told_with_what_it_is_at_odds_with(tmp_path):
    (wrong,) = api.check(asked(tmp_path, "share: 5%"), cache_dir=tmp_path / "cache").diagnostics
    assert wrong.note == "`clients` is 4 where it is left out"


def test_the_limits_in_the_header_are_those_of_the_server():
    secure, function = {"secure": True}, {"strategy": "abm", "way": "function", "trains": "reft"}
    for arguments, legal, illegal in ((secure, LEAST, LEAST - 1), (function, MANY, MANY + 1)):
        conflicts = [
            [p for p in Flower(path="fed", data=DataRef("words"), clients=clients, **arguments).problems()
             if isinstance(p, Conflict)]
            for clients in (legal, illegal)
        ]  # fmt: skip
        assert [len(problems) for problems in conflicts] == [0, 1]


def test_each_parameter_that_may_be_unread_is_tried():
    problems = Registry().vocabulary.words("target")["flower"].problems
    assert {name for p in problems if isinstance(p, Unread) for name in p.params} == set(UNREAD)


def refused_by_compile(folder, recipe):
    savings_table(folder)
    with pytest.raises(Reject) as refused:
        api.compile(recipe, out=folder / "out", cache_dir=folder / "cache")
    (wrong,) = refused.value.diagnostics
    assert not (folder / "out").exists() or not any((folder / "out").iterdir())
    return wrong


def test_interventions_learn_nothing_of_rows_without_prompts(tmp_path):
    recipe = asked(tmp_path, "trains: reft, strategy: fedavg")
    recipe.write_text(recipe.read_text().replace("shared(base) { }", "shared(base) { e = reft.insert() }"))
    wrong = refused_by_compile(tmp_path, recipe)
    assert wrong.slug == "unfit-strategy" and "where a prompt ends" in wrong.message and wrong.span is not None


def test_interventions_that_no_step_inserts_are_asked_for_by_check(tmp_path):
    savings_table(tmp_path)
    (wrong,) = api.check(asked(tmp_path, "trains: reft, strategy: fedavg"), cache_dir=tmp_path / "cache").diagnostics
    assert wrong.slug == "missing-step" and "needs `reft.insert` before it" in wrong.message
    assert wrong.span.text == "reft" and "reft.insert(...)" in wrong.help
    assert not api.check(asked(tmp_path, "strategy: fedavg"), cache_dir=tmp_path / "cache").diagnostics


@pytest.mark.parametrize(
    ("more", "slug", "blamed", "says"),
    [
        ("split: dirichlet, beta: 0.01", "empty-client", "", "of 4 would have none"),
        ("hold: 99%", "empty-client", "hold", "judge itself by 8 of its 9 rows and learn from 1"),
        ("trains: prompt, tokens: 5000", "unfit-strategy", "tokens", "made for 512"),
        ("strategy: coverage, trains: full, budgets: [100%, 1%, 50%, 50%]", "budget-too-small", "budgets", "smallest"),
        ("strategy: coverage, trains: full, budgets: [1MiB, 50%, 50%, 50%]", "budget-too-small", "budgets", "memory"),
        ("strategy: coverage, trains: full, budgets: [1.5M, 50%, 50%, 50%]", "unfit-strategy", "budgets", "largest"),
        ("rank: 65", "rank-too-large", "rank", "an adapter has rank 65"),
        ("strategy: svd, ranks: [1, 2, 4, 500]", "rank-too-large", "ranks", "none above 64"),
        ('on: "lm_head"', "tied-adapter", "on", "is tied to another module's"),
    ],
)
@pytest.mark.slow
def test_what_data_or_model_do_not_allow_is_refused_before_anything_is_written(tmp_path, more, slug, blamed, says):
    wrong = refused_by_compile(tmp_path, asked(tmp_path, more))
    assert wrong.slug == slug and says in wrong.message and wrong.argument.split(" ")[0] == blamed
    assert wrong.span is not None and "method: " not in wrong.help  # which this target does not have
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())

"""What clients may train besides adapters: interventions, sub-networks within budgets, privately row by row."""

import json
import math

import numpy as np
import pytest
import torch
from effc.compiler.apps.federation.app import PACKAGE
from effc.compiler.apps.federation.client_host import ClientHost
from effc.compiler.apps.federation.coverage import slice_state
from effc.compiler.apps.federation.declaration import read_declaration
from effc.compiler.apps.federation.language import Local, accumulate_dp_sgd_gradient
from effc.compiler.apps.federation.results import write_results
from effc.compiler.apps.federation.simulation import simulate_federation
from effc.compiler.apps.federation.sizes import cut_to_sub_network, largest_sub_networks
from effc.compiler.artifacts import reft
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.compiler.inputs.sources.zoo import zoo_folders_by_name
from effc.compiler.ir.capture.capture import capture
from effc.compiler.models.rows.forward import total_nll
from effc.compiler.transforms.training.trainable import TrainedParameters
from effc.dsl.syntax.diagnostics import Reject
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

RECIPE = """effspec 1
model base = zoo("tiny-llama")
data words = {data}
pipeline shared(base) {{ {steps} }}
emit shared {{ flower("fed", data: words, clients: 3, rounds: 2, steps: 4, batch: 4, hold: 25%, lr: 5e-3, {more}) }}
"""


def compiled(folder, data, steps, more):
    goods = ("apples", "nails", "ropes", "candles", "jars")
    records = [{"prompt": f"Ann pays {n % 7} coins for", "answer": goods[n % 5]} for n in range(48)]
    (folder / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "fed.effspec").write_text(RECIPE.format(data=data, steps=steps, more=more))
    (result,) = api.compile(folder / "fed.effspec", out=folder / "out", cache_dir=folder / "cache", force=True)
    path = result.artifacts[0].path
    return path, read_declaration(path / PACKAGE / "federation.json")


PAIRS = 'pairs("p.jsonl", join: " ", length: 24)'
INSERT = 'edits = reft.insert(positions: "f2+l2", rank: 2, on: "model.layers.{0,1}")'


def base():
    return AutoModelForCausalLM.from_pretrained(zoo_folders_by_name()["tiny-llama"])


def run(path, declared, tmp_path):
    return simulate_federation(declared, path / declared.folder, path.parents[1], Settings(tmp_path / "cache"))


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("reft"), PAIRS, INSERT, "trains: reft, strategy: abm")


def test_interventions_are_federated_and_r_stays_orthonormal(edited, tmp_path):
    path, declared = edited
    made = run(path, declared, tmp_path)
    first, last = made.course.rounds[0], made.course.rounds[-1]
    assert last.loss < np.mean([t.before for t in first.updates.values()])
    assert {t.bytes_up for t in last.updates.values()} == {4 * 2 * (2 * 128 * 2 + 2)}  # layers (2 d r + r) float32
    for state in made.strategy.results().values():
        for name in (n for n in state if n.endswith(".R")):
            np.testing.assert_allclose(state[name] @ state[name].T, np.eye(2), atol=1e-5)


def test_a_clients_interventions_go_onto_the_base_again(edited, tmp_path):
    path, declared = edited
    made = run(path, declared, tmp_path)
    write_results(made.strategy.results(), made.course, declared, tmp_path / "result", path)
    model = base()
    reft.attach_interventions(model, tmp_path / "result" / "client-1" / "reft")
    with ClientHost(declared, path / declared.folder, path.parents[1], Settings(tmp_path / "cache")).participants(
        [1]
    ) as (one,):
        held = one.learner.held_out
        wanted = one.learner.loss(made.strategy.results()["client-1"], {})
    nats, tokens = total_nll(model, held.ids, held.speech, held.prompts)
    assert nats / tokens == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("way", ["project", "function"])
def test_other_ways_of_putting_interventions_together_learn_too(edited, tmp_path, way):
    path, declared = edited
    made = run(path, declared.with_changes(way=way, strategy="abm"), tmp_path)
    assert made.course.rounds[-1].loss < np.mean([t.before for t in made.course.rounds[0].updates.values()])


def test_a_clients_size_is_the_largest_within_its_budget_and_the_least_is_named():
    program = capture(base())
    whole = sum(p.numel() for p in program.model.parameters())
    shares = (1.0, 0.8, 0.6, 0.8)
    sizes = largest_sub_networks(program, shares)
    assert sizes[0].params == whole and not sizes[0].indices and sizes[1] == sizes[3]
    assert all((share - 0.05) * whole < s.params <= share * whole for s, share in zip(sizes, shares, strict=True))
    with pytest.raises(Reject) as refused:
        largest_sub_networks(program, [0.01])
    assert "give it at least" in refused.value.diagnostics[0].help


def test_a_sub_network_is_a_part_of_the_whole_and_runs():
    program = capture(base())
    size = largest_sub_networks(program, [0.7])[0]
    whole = {n: p.detach().numpy().copy() for n, p in program.model.named_parameters()}
    cut_to_sub_network(program, size)
    part = slice_state(whole, size.index())
    left = {n: p.detach().numpy() for n, p in program.model.named_parameters()}
    assert left.keys() == part.keys() and all(np.array_equal(left[n], part[n]) for n in left)
    assert torch.isfinite(program.model(torch.arange(8)[None]).logits).all()


def test_clients_of_different_size_learn_together_and_send_what_they_hold(edited, tmp_path):
    path, declared = edited
    program = capture(api.load(path))
    sizes = largest_sub_networks(program, [1.0, 0.8, 0.6])
    full = {name: tuple(p.shape) for name, p in program.model.named_parameters()}
    wanted = {"trains": "full", "strategy": "coverage", "full": full, "sizes": tuple(sizes), "size_of": (0, 1, 2)}
    made = run(path, declared.with_changes(**wanted, lr=5e-4), tmp_path)
    first, last = made.course.rounds[0], made.course.rounds[-1]
    assert last.loss < np.mean([t.before for t in first.updates.values()]) and not last.faults
    sent = [last.updates[k].bytes_up for k in range(3)]
    assert sent == [4 * size.params for size in sizes] and sent[0] > sent[1] > sent[2]


def test_sizes_that_are_drawn_anew_are_trained_by_clients_that_afford_them(edited, tmp_path):
    path, declared = edited
    program = capture(api.load(path))
    sizes = largest_sub_networks(program, [1.0, 0.6])
    full = {name: tuple(p.shape) for name, p in program.model.named_parameters()}
    wanted = {"trains": "full", "strategy": "coverage", "full": full, "sizes": tuple(sizes), "size_of": (0, 0, 1)}
    made = run(path, declared.with_changes(**wanted, allocation="sandwich", rounds=3, steps=1), tmp_path)
    sent = [[r.updates[k].bytes_up for k in range(3)] for r in made.course.rounds]
    whole, part = (4 * size.params for size in sizes)
    assert not made.course.rounds[-1].faults
    assert all(whole in row and part in row and row[2] == part for row in sent)
    assert len({tuple(row) for row in sent}) > 1  # who trains all of it changes


def test_a_private_client_learns_from_clipped_rows(edited, tmp_path):
    path, declared = edited
    private = declared.with_changes(strategy="fedavg", protects="rows", clip=1.0, noise=0.01)
    made = run(path, private, tmp_path)
    assert made.course.rounds[-1].loss < np.mean([t.before for t in made.course.rounds[0].updates.values()])


def test_the_gradient_of_a_private_step_is_a_mean_of_clipped_rows():
    weight = torch.nn.Parameter(torch.zeros(3))
    held = TrainedParameters({"w": weight})

    def learn(chosen, factor):
        (weight * torch.tensor([100.0, 0.0, 0.0])).sum().backward()
        return 0.0

    accumulate_dp_sgd_gradient(
        held, learn, 4, Local(1, 4, 0.1, clip=0.5, noise=0.0)
    )  # with batch 4 of 4 all rows are taken
    assert math.isclose(weight.grad.norm().item(), 4 * 0.5 / 4, rel_tol=1e-6)


def test_interventions_at_more_positions_than_any_prompt_has_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(Reject, match=r"edit 40 positions, and the longest prompt of `words` has \d+ tokens"):
        compiled(tmp_path, PAIRS, INSERT.replace("f2+l2", "f20+l20"), "trains: reft, strategy: abm")
    assert not list((tmp_path / "out").glob("*/fedapp"))

"""Sub-networks of clients: cut by exact symmetries alone, and what weighs most is what stays."""

import json
import random
import tarfile
from copy import deepcopy
from statistics import mean

import pytest
import torch
from effc.compiler.apps.federation.declaration import Declaration, read_declaration
from effc.compiler.apps.federation.sizes import SubNetwork, cut_to_sub_network, cuttable_groups, largest_sub_networks
from effc.compiler.inputs.sources.zoo import zoo_folders_by_name
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.surgery import tensor_at
from effc.compiler.models.rows.forward import total_nll
from effc.compiler.transforms.search.importance import ascending_indices, l1_importance
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification

from tests import tiny
from tests.hostile.kinds import STORED

IDS = torch.arange(3, 27).view(2, 12)


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=2
    )
    return BertForSequenceClassification(config).eval()


@torch.no_grad()
def turn_round(program, group) -> None:
    """The same items in reverse order, in every tensor of the group."""
    for member in group.members:
        tensor = tensor_at(program.model, member.tensor)
        at = torch.tensor([i for item in range(group.count) for i in member.indices(item)])
        source = torch.tensor([i for item in reversed(range(group.count)) for i in member.indices(item)])
        tensor.data.index_copy_(member.axis, at, tensor.data.index_select(member.axis, source))


@pytest.mark.parametrize(
    "model", [lambda: tiny.model("llama"), lambda: tiny.model("gpt2"), bert], ids=["llama", "gpt2", "bert"]
)
@torch.no_grad()
def test_whatever_order_the_items_of_a_group_have_the_model_computes_the_same(model):
    program = capture(model())
    wanted = program.model(IDS).logits.clone()
    groups = cuttable_groups(program)
    assert {g.kind for g in groups} > {"channels"}
    for group in groups:
        turn_round(program, group)
    assert torch.allclose(program.model(IDS).logits, wanted, atol=1e-4)


@torch.no_grad()
def test_under_rotary_positions_no_group_permutes_q_and_k_inside_of_heads():
    program = capture(tiny.model("llama"))
    attention = program.model.model.layers[0].self_attn
    wanted = program.model(IDS).logits.clone()
    d = attention.head_dim
    for weight in (attention.q_proj.weight, attention.k_proj.weight):
        weight.copy_(weight.view(-1, d, weight.shape[1]).flip(1).reshape(weight.shape))
    assert not torch.allclose(program.model(IDS).logits, wanted, atol=1e-2)  # as RaFFM's code does it
    for group in cuttable_groups(program):
        for member in group.members:
            if member.tensor.endswith(("q_proj.weight", "k_proj.weight")):
                assert len(list(member.indices(0))) % d == 0, "an item is whole heads"


def loss(model, ids, cuts) -> float:
    """Of a copy without these items."""
    program = capture(deepcopy(model))
    cut_to_sub_network(program, SubNetwork(0, cuts, {}))
    nats, tokens = total_nll(program.model, ids)
    return nats / tokens


@pytest.mark.slow
def test_heads_that_weigh_least_are_missed_less_than_some_by_chance_and_those_that_weigh_most():
    path = zoo_folders_by_name()["tiny-llama"]
    model = AutoModelForCausalLM.from_pretrained(path)
    text = (path / "heldout.txt").read_text()[:900]  # which it has not seen
    ids = torch.tensor(AutoTokenizer.from_pretrained(path)(text)["input_ids"][:192]).view(4, 48)
    program = capture(model)
    heads = [g for g in cuttable_groups(program) if g.kind == "kv_heads"]
    order = {f"{g.site} kv_heads": ascending_indices(l1_importance(program, g)) for g in heads}
    least, most = ({n: tuple(found[end]) for n, found in order.items()} for end in (slice(0, 1), slice(-1, None)))
    chance = [{n: (random.Random(f"{seed} {n}").randrange(4),) for n in order} for seed in range(4)]
    by_chance = mean(loss(model, ids, cuts) for cuts in chance)
    assert loss(model, ids, least) < by_chance < loss(model, ids, most)


@pytest.mark.slow
def test_a_size_drops_the_items_that_weigh_least():
    program = capture(tiny.model("llama"))
    (size,) = largest_sub_networks(program, [0.7])
    for group in cuttable_groups(program):
        items = size.cuts[f"{group.site} {group.kind}"]
        assert set(items) == set(ascending_indices(l1_importance(program, group))[: len(items)])


def stored_declaration():
    with tarfile.open(STORED / "kinds.tar.xz") as archive:
        return json.load(archive.extractfile("kinds/flower/fedapp/federation.json"))


@pytest.mark.parametrize("name", ["indices", "kept"])
def test_a_declaration_with_sub_networks_is_read_back(name, tmp_path):
    cut = {"model.layers.0.mlp.up_proj.B": ((0, 2, 5), None)}
    sizes = (SubNetwork(9, {"mlp channels": (1, 3)}, cut), SubNetwork(12, {}, {}))
    declared = Declaration.from_json(stored_declaration()).with_changes(sizes=sizes, size_of=(1, 0))
    written = json.loads(json.dumps(declared.to_json()))
    for size in written["sizes"]:
        size[name] = size.pop("indices")
    (tmp_path / "federation.json").write_text(json.dumps(written))
    again = read_declaration(tmp_path / "federation.json")
    assert again == declared and again.identity == declared.identity


@pytest.mark.parametrize(
    "axes", [[[0, 99], None], [[2, 1], None], [[], None], [[-1], None], [[0]], [[0.5], None], [[True], None], 3]
)
def test_indices_outside_of_an_array_are_no_declaration(axes):
    body = stored_declaration()
    body["sizes"] = [{"params": 9, "cuts": {}, "indices": {"model.layers.0.mlp.up_proj.B": axes}}]
    with pytest.raises(ValueError):
        Declaration.from_json({**body, "size_of": [0, 0]})

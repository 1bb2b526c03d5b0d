"""Edits leave a model that is what it should be, decodes right, and comes back from plain data."""

import copy
import json
import operator

import pytest
import torch
from effc.compiler.evaluation.equivalence import max_difference, record_logits_of_sample_calls
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.edits import Edits, replay_edits
from effc.compiler.ir.graphs import ancestors
from effc.compiler.ir.slots import assign_cache_slots
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.dsl.syntax.diagnostics import Reject
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaForCausalLM

from tests import tiny
from tests.equivalence import max_logit_difference
from tests.grids import wide
from tests.weights import load_weights, weights_of
from tests.worlds import refused

torch.set_num_threads(1)
STAND = ("llama", "gemma2", "gpt2", "phi3")  # that go one residual add after the other
SEQUENTIAL = tuple(name for name in tiny.NAMES if name != "gpt_neox")  # one residual add after the other
ROUNDING = 1e-4  # sums in another order, logits of size about 5, float32


def branches(unit):
    """(join, module that writes the branch, whether it is attention) of each residual branch, in order."""
    found = []
    for node in unit.graph.nodes:
        if node.target is operator.add and all(isinstance(a, torch.fx.Node) for a in node.args):
            entry, branch = sorted(node.args, key=list(unit.graph.nodes).index)
            if entry in ancestors(branch):
                new = ancestors(branch) | {branch}
                new -= ancestors(entry)
                writer = next(
                    n
                    for n in reversed(list(unit.graph.nodes))
                    if n in new and n.op == "call_module" and n.meta["role"] not in ("dropout", "norm")
                )
                found.append((node.name, writer.target, any(n.meta.get("role") == "attention" for n in new)))
    return found


def timeouts(model, path):
    """Zero what a module writes; a norm behind it then gives zeros, too."""
    module = model.get_submodule(path)
    with torch.no_grad():
        module.weight.zero_()
        if module.bias is not None:
            module.bias.zero_()


def rebuilt(program, name, **changes):
    """The program's model made again from its base config, its edits as JSON text, and its weights."""
    edits = Edits.from_json(json.loads(json.dumps(program.edits.to_json())))
    with torch.device("meta"):
        skeleton = tiny.blank(name, **changes)
    replay_edits(skeleton, edits)
    load_weights(skeleton, weights_of(program.model))
    return skeleton.eval()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("which", [0, 1], ids=["attention", "mlp"])
@pytest.mark.parametrize("name", wide(SEQUENTIAL, STAND))
def test_a_dropped_branch_equals_one_that_writes_zeros(name, which, layer):
    model = tiny.model(name)
    reference = copy.deepcopy(model)
    program = capture(model)
    unit = list(program.units.values())[layer]
    join, writer, is_attention = branches(unit)[which]
    assert is_attention == (which == 0)
    before = sum(p.numel() for p in model.parameters())
    with Rewriter(program) as rewrite:
        rewrite.drop_branch(unit.path, join)
    timeouts(reference, f"{unit.path}.{writer}")
    assert max_logit_difference(reference, model) == 0.0
    assert sum(p.numel() for p in model.parameters()) < before
    assert max_logit_difference(model, rebuilt(program, name)) == 0.0


def test_parallel_branches_are_dropped_by_naming_what_stays():
    model = tiny.model("gpt_neox")
    reference = copy.deepcopy(model)
    program = capture(model)
    for path, writer in (("gpt_neox.layers.0", "attention.dense"), ("gpt_neox.layers.1", "mlp.dense_4h_to_h")):
        first = next(n for n in program.units[path].graph.nodes if n.target is operator.add)
        keep = next(a.name for a in first.args if ("mlp" in a.name) == ("attention" in writer))
        with Rewriter(program) as rewrite:
            rewrite.drop_branch(path, first.name, keep)
        timeouts(reference, f"{path}.{writer}")
    assert max_logit_difference(reference, model) == 0.0
    assert max_logit_difference(model, rebuilt(program, "gpt_neox")) == 0.0


def test_an_add_whose_operands_are_strangers_needs_a_word_on_which_one_stays():
    program = capture(tiny.model("gpt_neox"))
    unit = program.units["gpt_neox.layers.0"]
    first = next(n.name for n in unit.graph.nodes if n.target is operator.add)
    with pytest.raises(AssertionError, match="say which one stays"):
        Rewriter(program).drop_branch(unit.path, first)


@pytest.mark.parametrize("name", wide(SEQUENTIAL, STAND))
def test_attention_of_the_first_layers_gone_the_rest_generates_the_same_tokens_however_cached(name):
    model = tiny.model(name)
    program = capture(model)
    reference = copy.deepcopy(model)
    for layer in (0, 1):
        unit = list(program.units.values())[layer]
        join, writer, _ = branches(unit)[0]
        with Rewriter(program) as rewrite:
            rewrite.drop_branch(unit.path, join)
        timeouts(reference, f"{unit.path}.{writer}")
    ids, mask = [[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]], [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    text = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    for how in ({}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}):
        made = [m.generate(**text, max_new_tokens=8, min_new_tokens=8, **how) for m in (reference, model)]
        assert torch.equal(*made), how
    assert max_logit_difference(reference, model) == 0.0


@pytest.mark.parametrize(
    "name", wide((*tiny.NAMES, "mixtral", "gpt_oss", "bloom", "gpt_neo", "mamba2", "bert"), (*STAND, "mixtral", "bert"))
)
@pytest.mark.parametrize("layer", [0, 2])
def test_a_dropped_layer_equals_one_that_returns_its_input(name, layer):
    model = tiny.model(name)
    reference = copy.deepcopy(model)
    program = capture(model)
    path = list(program.units)[layer]
    reference.get_submodule(path).register_forward_hook(
        lambda _, args, out: (args[0], *out[1:]) if isinstance(out, tuple) else args[0]
    )
    with Rewriter(program) as rewrite:
        rewrite.drop_layer(path)
    assert max_logit_difference(reference, model) == 0.0
    assert len(program.units) == model.config.num_hidden_layers == 2
    assert max_logit_difference(model, rebuilt(program, name)) == 0.0


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "opt", "smollm3"])
def test_the_config_of_a_model_without_a_layer_builds_that_model(name):
    model = tiny.model(name)
    program = capture(model)
    with Rewriter(program) as rewrite:
        rewrite.drop_layer(list(program.units)[1])
    plain = type(model)(copy.deepcopy(model.config)).eval()
    plain.load_state_dict(model.state_dict())
    assert max_logit_difference(model, plain) == 0.0


@pytest.mark.parametrize(("name", "is_counted"), [("gpt2", True), ("llama", False)])
def test_the_last_attention_stays_where_the_cache_says_at_which_row_of_a_table_the_next_token_stands(name, is_counted):
    program = capture(tiny.model(name))
    attentions = [(path, branches(unit)[0][0]) for path, unit in program.units.items()]
    for path, join in attentions[:-1]:
        Rewriter(program).drop_branch(path, join)
    if not is_counted:
        return Rewriter(program).drop_branch(*attentions[-1])
    (diagnostic,) = refused(lambda: Rewriter(program).drop_branch(*attentions[-1])).diagnostics
    assert diagnostic.slug == "layer-needed" and "table of positions" in diagnostic.message


@pytest.mark.parametrize(("name", "layer"), [("jamba", 0), ("jamba", 1), ("gemma4_text", 1), ("bamba", 1), ("rwkv", 0)])
def test_a_layer_that_the_model_does_not_run_without_is_refused_before_anything_changes(name, layer):
    model = tiny.model(name)
    program = capture(model)
    path = list(program.units)[layer]
    before = (
        record_logits_of_sample_calls(model),
        copy.deepcopy(program.edits),
        vars(copy.deepcopy(model.config)),
        list(program.units),
    )
    (diagnostic,) = refused(lambda: Rewriter(program).drop_layer(path)).diagnostics
    assert diagnostic.slug == "layer-needed" and path in diagnostic.message and diagnostic.exit == 3
    assert (program.version, program.edits, vars(model.config), list(program.units)) == (1, *before[1:])
    assert max_difference(before[0], record_logits_of_sample_calls(model)) == 0.0


@given(st.data())
def test_no_kind_of_cache_has_an_empty_first_slot(data):
    kinds = tuple(
        data.draw(st.lists(st.sampled_from(["full_attention", "sliding_attention", "chunked"]), min_size=1, max_size=8))
    )
    live = tuple(data.draw(st.lists(st.booleans(), min_size=len(kinds), max_size=len(kinds))))
    found = assign_cache_slots(kinds, live)
    assert sorted(found.slots) == list(range(len(kinds)))
    used = {slot for slot, alive in zip(found.slots, live, strict=True) if alive}
    for layer, alive in enumerate(live):
        if alive:
            assert found.kinds[layer] == kinds[layer] == found.kinds[found.slots[layer]]
    if used:
        assert all(found.kinds.index(kind) in used for kind in found.kinds)


def test_edits_one_upon_the_other_come_back_from_plain_data():
    """Branches, a layer, channels and an attribute: in an order in which paths and slots move about."""
    model = tiny.model("gemma3_text")
    program = capture(model)
    paths = list(program.units)
    rewrite = Rewriter(program)
    rewrite.drop_branch(paths[0], branches(program.units[paths[0]])[0][0])
    rewrite.commit()
    rewrite.drop_branch(paths[2], branches(program.units[paths[2]])[1][0])
    keep = torch.arange(0, 96, 3)
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        rewrite.narrow(f"{paths[0]}.mlp.{name}.weight", axis, keep)
    rewrite.set_attr(f"{paths[0]}.mlp.intermediate_size", 32)
    rewrite.commit()
    assert max_logit_difference(model, rebuilt(program, "gemma3_text")) == 0.0
    rewrite.drop_layer(paths[1])
    rewrite.commit()
    again = rebuilt(program, "gemma3_text")
    assert max_logit_difference(model, again) == 0.0
    assert again.model.layers[0].mlp.gate_proj.out_features == 32
    assert Edits.from_json(program.edits.to_json()) == program.edits


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_narrowed_channels_equal_silenced_ones_and_sizes_follow(name):
    model = tiny.model(name)
    reference = copy.deepcopy(model)
    program = capture(model)
    paths = list(program.units)
    keep = [i for i in range(96) if i % 4]
    cuts = {
        "llama": [("mlp.gate_proj.weight", 0), ("mlp.up_proj.weight", 0), ("mlp.down_proj.weight", 1)],
        "phi3": [("mlp.gate_up_proj.weight", 0), ("mlp.down_proj.weight", 1)],
        "gpt2": [("mlp.c_fc.weight", 1), ("mlp.c_fc.bias", 0), ("mlp.c_proj.weight", 0)],
    }[name]
    with Rewriter(program) as rewrite:
        for tensor, axis in cuts:
            double = tensor == "mlp.gate_up_proj.weight"
            rewrite.narrow(f"{paths[1]}.{tensor}", axis, keep + [96 + i for i in keep] if double else keep)
    sink, axis = cuts[-1]
    with torch.no_grad():
        dead = torch.tensor([i for i in range(96) if not i % 4])
        reference.get_parameter(f"{paths[1]}.{sink}").index_fill_(axis, dead, 0.0)
    assert max_logit_difference(reference, model) < ROUNDING
    assert len({unit.key for unit in program.units.values()}) == 1
    mlp = model.get_submodule(f"{paths[1]}.mlp")
    assert {
        "llama": lambda: mlp.down_proj.in_features,
        "phi3": lambda: mlp.down_proj.in_features,
        "gpt2": lambda: mlp.c_fc.nf,
    }[name]() == 72
    shapes = [
        node.meta["shape"] for node in program.units[paths[1]].graph.nodes if node.meta.get("role") == "activation"
    ]
    assert shapes == [(2, 7, 72)]
    assert max_logit_difference(model, rebuilt(program, name)) == 0.0


def test_a_removed_kv_group_is_removed_from_an_edited_graph_too():
    """GPT-2 splits by a literal that came from `split_size`: the kept graph must follow the attribute."""
    model = tiny.model("gpt2")
    reference = copy.deepcopy(model)
    program = capture(model)
    path = list(program.units)[1]
    with Rewriter(program) as rewrite:
        rewrite.drop_branch(path, branches(program.units[path])[1][0])
    head = torch.arange(48)  # the last of four heads of 16 goes
    with Rewriter(program) as rewrite:
        rewrite.narrow(f"{path}.attn.c_attn.weight", 1, torch.cat([head, head + 64, head + 128]))
        rewrite.narrow(f"{path}.attn.c_attn.bias", 0, torch.cat([head, head + 64, head + 128]))
        rewrite.narrow(f"{path}.attn.c_proj.weight", 0, head)
        rewrite.set_attr(f"{path}.attn.split_size", 48)
        rewrite.set_attr(f"{path}.attn.num_heads", 3)
    timeouts(reference, f"{path}.mlp.c_proj")
    with torch.no_grad():
        reference.get_parameter(f"{path}.attn.c_proj.weight")[48:].zero_()
    assert max_logit_difference(reference, model) < ROUNDING
    assert max_logit_difference(model, rebuilt(program, "gpt2")) == 0.0


def test_a_config_value_of_one_module_leaves_its_neighbours_alone():
    model = tiny.model("phi3")
    program = capture(model)
    with Rewriter(program) as rewrite:
        q, kv = torch.arange(32), torch.arange(16)
        rewrite.narrow("model.layers.1.self_attn.qkv_proj.weight", 0, torch.cat([q, 64 + kv, 96 + kv]))
        rewrite.narrow("model.layers.1.self_attn.o_proj.weight", 1, q)
        rewrite.set_attr("model.layers.1.self_attn.config.num_attention_heads", 2)
        rewrite.set_attr("model.layers.1.self_attn.num_key_value_heads", 1)
    assert model.config.num_attention_heads == 4
    assert model.model.layers[0].self_attn.config is model.config
    assert len({unit.key for unit in program.units.values()}) == 2
    assert max_logit_difference(model, rebuilt(program, "phi3")) == 0.0


def test_a_config_that_two_models_share_is_not_changed_under_the_other():
    config = tiny.config("llama")
    model, other = (LlamaForCausalLM(config) for _ in range(2))
    program = capture(model)
    with Rewriter(program) as rewrite:
        rewrite.drop_layer("model.layers.0")
    replay_edits(LlamaForCausalLM(config), program.edits)
    assert other.config.num_hidden_layers == 3
    assert model.config is model.model.config is model.model.layers[0].self_attn.config


def test_tied_weights_are_narrowed_together():
    model = tiny.model("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    program = capture(model)
    before = record_logits_of_sample_calls(model, vocab_size=100)
    with Rewriter(program) as rewrite:
        rewrite.narrow("model.embed_tokens.weight", 0, range(100))
        rewrite.set_attr("config.vocab_size", 100)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.lm_head.out_features, model.model.embed_tokens.num_embeddings) == (100, 100)
    assert max_difference([logits[..., :100] for logits in before], record_logits_of_sample_calls(model)) < ROUNDING
    again = rebuilt(program, "llama", tie_word_embeddings=True)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert max_logit_difference(model, again) == 0.0


def test_a_depthwise_convolution_keeps_one_group_per_channel():
    from effc.compiler.ir.surgery import narrow_tensor

    net = nn.Sequential(nn.Conv1d(8, 8, 3, groups=8, bias=False), nn.Conv2d(8, 6, 3, groups=2, bias=False))
    narrow_tensor(net, "0.weight", 0, torch.tensor([0, 3, 5]))
    assert (net[0].in_channels, net[0].out_channels, net[0].groups) == (3, 3, 3)
    assert net[0](torch.ones(1, 3, 5)).shape == (1, 3, 3)
    with pytest.raises(AssertionError, match="don't divide"):
        narrow_tensor(net, "1.weight", 0, torch.tensor([0, 1, 2, 3, 4]))


@pytest.mark.parametrize("keep", [[], [0, 0], [64], [-1]])
def test_indices_that_repeat_or_lie_outside_are_refused(keep):
    program = capture(tiny.model("llama"))
    with pytest.raises(AssertionError):
        Rewriter(program).narrow("model.layers.0.self_attn.q_proj.weight", 0, keep)


def test_layers_that_read_the_keys_of_another_keep_their_kind():
    kinds = ("sliding_attention", "full_attention", "sliding_attention", "full_attention")
    whole = assign_cache_slots(kinds, (True, True, False, False), reads_keys=(True, True, True, True))
    assert whole.kinds == kinds and whole.slots == (0, 1, 2, 3)
    without = assign_cache_slots(kinds, (False, True, False, False), reads_keys=(False, True, True, True))
    assert without.kinds[1:] == kinds[1:] and without.slots[1] == 0 and without.kinds[0] == "full_attention"
    assert assign_cache_slots(kinds, (True, False, False, False), reads_keys=(True, False, True, True)).kinds == (
        "sliding_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
    )


def test_an_edit_raises_the_version_and_no_edit_does_not():
    program = capture(tiny.model("llama"))
    with Rewriter(program):
        pass
    assert program.version == 1
    with Rewriter(program) as rewrite:
        rewrite.set_attr("model.layers.0.self_attn.scaling", 0.5)
    assert program.version == 2


@pytest.mark.parametrize(
    "damage",
    [
        {"format": 9},
        {"layers": {"model.layers": [7]}},
        {"layers": {"model.norm": [0]}},
        {"deleted": ["model.nothing"]},
        {"shapes": {"model.layers.0.mlp.up_proj.weight": [1 << 30, 64]}},
        {"shapes": {"model.nothing.weight": [3]}},
        {"attributes": {"model.layers.0.__class__": 3}},
        {"attributes": {"model.nothing.x": 3}},
        {"slots": {"model": -1}},
        {"swapped": {"model.norm": {"class": "os:system", "spec": {}}}},
        {"swapped": {"model.norm": {"class": "passes.prune.blocks:Blocks", "spec": {}}}},
        {"swapped": {"model.norm": {"class": "__import__", "spec": {}}}},
        {"swapped": {"model.norm": {"class": "compiler.ir.program:Program", "spec": {}}}},
        {"graphs": {"model.layers.0": {"graph": {}, "placeholders": [], "statics": {}}}},
        {"extra": 1},
    ],
    ids=lambda damage: json.dumps(damage)[:60],
)
def test_edits_that_do_not_fit_are_refused(damage):
    data = Edits().to_json() | damage
    with pytest.raises(Reject):
        replay_edits(tiny.model("llama"), Edits.from_json(data))

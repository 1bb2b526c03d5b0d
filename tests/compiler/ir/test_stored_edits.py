"""A stored edit comes from anybody: what it may call, read and set is decided before anything happens."""

import copy
import json

import pytest
import torch
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.edits import Edits, replay_edits
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.dsl.syntax.diagnostics import Reject

from tests import tiny
from tests.compiler.transforms.test_rewrite import branches

torch.set_num_threads(1)
LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def honest():
    """Edits of a Llama that lost an MLP of its second layer."""
    program = capture(tiny.model("llama"))
    join, _, attention = branches(program.units[LAYER])[-1]
    assert not attention
    with Rewriter(program) as rewrite:
        rewrite.drop_branch(LAYER, join)
    return json.loads(json.dumps(program.edits.to_json()))


def refusal(edits, model=None) -> str:
    with pytest.raises(Reject) as refused:
        replay_edits(model or tiny.model("llama"), Edits.from_json(edits))
    assert refused.value.diagnostics[0].slug in ("refused-edits", "refused-graph")
    return refused.value.diagnostics[0].message


def with_node(honest, **entry):
    """The honest edits with a node put in front of the output, which gives it out."""
    edits = copy.deepcopy(honest)
    nodes = edits["graphs"][LAYER]["graph"]["nodes"]
    nodes.insert(-1, {"name": "evil", "args": [], "kwargs": {}, **entry})
    nodes[-1]["args"] = [{"node": "evil"}]
    return edits


def test_honest_edits_are_replayed(honest):
    replay_edits(tiny.model("llama"), Edits.from_json(honest))


@pytest.mark.parametrize(
    "target",
    [
        "from_pretrained",
        "save_pretrained",
        "self_attn.config.to_json_file",
        "self_attn.config.from_pretrained",
        "__class__",
        "self_attn.forward",
        "self_attn.to",
        "self_attn.config",
        "self_attn.__init__",
        "train",
        "self_attn.q_proj.weight",
        "self_attn.q_proj.weight.numpy",
        "self_attn.config.push_to_hub",
        "_call_impl",
        "self_attn.q_proj.__call__",
        "register_forward_hook",
        "self_attn.layer_idx",
        "nothing",
        "self_attn.nothing.deeper",
        "self_attn._modules",
        "self_attn.q_proj.load_state_dict",
        "gradient_checkpointing_enable",
        "self_attn.config.save_pretrained",
    ],
)
def test_only_modules_that_compute_are_called(honest, target, tmp_path):
    call = with_node(honest, op="call_module", target=target, args=[str(tmp_path / "written")])
    assert " hold" in refusal(call)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "target",
    [
        "self_attn",
        "self_attn.config",
        "self_attn.q_proj",
        "from_pretrained",
        "__class__",
        "self_attn.forward",
        "self_attn.config.model_type",
        "self_attn._parameters",
        "self_attn.q_proj._forward_hooks",
        "_modules",
        "self_attn.config.num_hidden_layers",
        "self_attn.q_proj.bias",
    ],
)
def test_what_is_read_is_a_tensor_or_a_number(honest, target):
    assert " hold" in refusal(with_node(honest, op="get_attr", target=target))


@pytest.mark.parametrize("target", ["self_attn.q_proj.weight", "self_attn.scaling", "self_attn.layer_idx"])
def test_tensors_and_numbers_are_read(honest, target):
    replay_edits(tiny.model("llama"), Edits.from_json(with_node(honest, op="get_attr", target=target)))


@pytest.mark.parametrize(
    "call",
    [
        {"op": "call_method", "target": "to", "args": [{"node": "read"}, {"dtype": "float16"}]},
        {"op": "call_method", "target": "half", "args": [{"node": "read"}]},
        {"op": "call_function", "target": "operator.setitem", "args": [{"node": "read"}, "x", 1]},
        {"op": "call_function", "target": "operator.getitem", "args": [{"node": "read"}, 0]},
        {"op": "call_function", "target": "getattr", "args": [{"node": "read"}, "data"]},
        {"op": "call_function", "target": "leaf.masked", "args": [{"node": "read"}, None]},
        {"op": "call_function", "target": "leaf.attention", "args": [None, {"node": "read"}, None, None, None]},
        {"op": "call_function", "target": "leaf.rotary", "args": []},
        {"op": "call_function", "target": "leaf.rotary", "args": ["self_attn"]},
        {"op": "call_function", "target": "leaf.causal_conv", "args": [1, 2, 3], "kwargs": {"odd": 1}},
        {"op": "call_function", "target": "leaf.cache_update", "args": [{"node": "read"}, 0, 0, 0]},
        {"op": "call_function", "target": "leaf.cache_update", "args": [None, 0, 0, 1 << 40]},
        {"op": "call_function", "target": "torch.norm", "args": [0.0, "/etc/passwd"]},
        {"op": "call_module", "target": "self_attn.q_proj", "args": ["../../escape"]},
    ],
    ids=lambda call: f"{call['target']} {call['args']}"[:60],
)
def test_a_function_is_given_what_it_takes(honest, call):
    edits = with_node(honest, **call)
    nodes = edits["graphs"][LAYER]["graph"]["nodes"]
    nodes.insert(-2, {"op": "get_attr", "name": "read", "target": "self_attn"})
    assert " hold" in refusal(edits)


def test_a_function_of_the_library_is_not_imported_because_a_file_names_it(honest):
    """The module of another architecture is there, and nobody has asked for it."""
    import sys

    name = "transformers.models.nemotron.modeling_nemotron"
    was = sys.modules.pop(name, None)
    try:
        call = with_node(honest, op="call_function", target=f"{name}.apply_rotary_pos_emb", args=[1])
        assert "the function" in refusal(call)
        assert name not in sys.modules
    finally:
        if was is not None:
            sys.modules[name] = was


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("config._attn_implementation", "org/kernel"),
        ("config._attn_implementation_internal", "org/kernel"),
        ("config.attn_implementation", "org/kernel"),
        ("config.auto_map", {"AutoModel": "evil.Evil"}),
        ("config.quantization_config", {"quant_method": "evil"}),
        ("config.architectures", ["Evil"]),
        ("config.model_type", "gpt2"),
        ("config.name_or_path", "org/evil"),
        ("config.hidden_act", "evil"),
        ("config.num_hidden_layers", 10**9),
        ("config.num_hidden_layers", -1),
        ("config.vocab_size", True),
        ("config.num_hidden_layers", "2"),
        ("config.rope_parameters", {"rope_type": "evil"}),
        ("config.layer_types", ["full_attention"] * 3),
        ("config.to_dict", 1),
        ("config.num_hidden_layers.real", 1),
        ("model.layers.0.self_attn.config._attn_implementation", "org/kernel"),
        ("model.layers.0.self_attn.layer_idx", 10**9),
        ("model.layers.0.forward", 1),
        ("model.layers.0.__class__", 1),
        ("model.layers.0.self_attn._parameters", {}),
        ("model.layers.0.self_attn.head_dim", 10**9),
        ("model.layers.0.self_attn.scaling", float("inf")),
        ("model.layers.0.self_attn.new", 1),
        ("model.layers.0.self_attn.config", {}),
        ("generation_config.max_length", 1),
        ("model.layers.9.x", 1),
    ],
)
def test_only_numbers_that_passes_make_smaller_are_set(path, value):
    model = tiny.model("llama")
    before = model.config.to_dict()
    refusal(Edits(attributes={path: value}).to_json(), model)
    assert model.config.to_dict() == before


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ({"slots": {"model.layers.0": 10**9}}, "beyond the last layer"),
        ({"deleted": ["config"]}, "no module and no parameter"),
        ({"deleted": ["model.layers.0.forward"]}, "no module and no parameter"),
        ({"swapped": {"model.norm": {"class": "KernelLinear", "spec": {}}}}, "in place of a LlamaRMSNorm"),
        (
            {
                "swapped": {
                    "model.layers.0.mlp.down_proj": {
                        "class": "KernelLinear",
                        "spec": {
                            "kernel": "dense_linear",
                            "in_features": 96,
                            "out_features": 64,
                            "bytes": 1 << 50,
                            "bias": False,
                        },
                    }
                }
            },
            "bytes",
        ),
        (
            {
                "swapped": {
                    "model.layers.0.mlp.down_proj": {
                        "class": "KernelLinear",
                        "spec": {
                            "kernel": "dense_linear",
                            "in_features": 1 << 30,
                            "out_features": 64,
                            "bytes": 9,
                            "bias": True,
                        },
                    }
                }
            },
            "inputs",
        ),
    ],
    ids=str,
)
def test_sizes_and_places_are_those_of_the_skeleton(edits, said):
    assert said in refusal(Edits().to_json() | edits)


def test_a_graph_within_another_graph_is_refused(honest):
    edits = copy.deepcopy(honest)
    edits["graphs"][f"{LAYER}.self_attn"] = edits["graphs"][LAYER]
    refusal(edits)


def test_a_graph_that_takes_other_arguments_is_refused(honest):
    edits = copy.deepcopy(honest)
    edits["graphs"][LAYER]["placeholders"] = ["hidden_states", "self"]
    assert "other arguments" in refusal(edits)

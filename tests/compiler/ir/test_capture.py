"""Capture: graphs that are the model's own forward, on any shape, whatever runs them."""

import copy
import gc

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.evaluation.equivalence import record_logits_of_sample_calls
from effc.compiler.ir.capture import patches
from effc.compiler.ir.capture.capture import capture, full_model_unit
from effc.compiler.ir.capture.first_calls import record_first_calls, record_further_unit_calls
from effc.compiler.ir.capture.sample import sample_inputs, sample_tokens
from effc.compiler.ir.traced_integers import TracedInt, evaluate_expression
from effc.dsl.syntax.diagnostics import Reject
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

from tests import tiny
from tests.equivalence import max_logit_difference
from tests.grids import wide

torch.set_num_threads(1)


def bind(program):
    for unit in program.units.values():
        unit.install_graph_forward(program.model)
    return program.model


@pytest.fixture(scope="module", params=tiny.NAMES)
def pair(request):
    """A model, and a copy of it whose layers run their captured graphs."""
    model = tiny.model(request.param)
    return model, bind(capture(copy.deepcopy(model)))


def test_bound_units_give_the_same_logits_on_all_shapes_padded_and_cached(pair):
    assert max_logit_difference(*pair) == 0.0


@pytest.mark.parametrize("name", tiny.WIDER)
def test_experts_states_and_encoders_are_captured_exactly_too(name):
    model = tiny.model(name)
    reference = copy.deepcopy(model)
    program = capture(model)
    assert max_logit_difference(reference, bind(program)) == 0.0
    assert program.units and full_model_unit(program)


@pytest.mark.parametrize("name", ["bert", "rwkv"])
def test_bound_units_decode_with_what_they_are_given_and_run_without_it(name):
    model = tiny.model(name)
    models = model, bind(capture(copy.deepcopy(model)))
    given = {
        k: v for k, v in sample_tokens(100, 1, 6, 0).items() if k != "position_ids"
    }  # rwkv decodes single rows only
    made = [m.generate(**given, max_new_tokens=6, min_new_tokens=6) for m in models]
    assert torch.equal(*made)
    assert torch.equal(*(m(**given, use_cache=False).logits for m in models))


@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"do_sample": True, "top_k": 8}],
    ids=["greedy", "beams", "static", "sampled"],
)
def test_bound_units_generate_the_same_tokens_from_a_left_padded_batch(pair, how):
    given = {k: v for k, v in sample_tokens(100, 2, 6, 2).items() if k != "position_ids"}
    made = []
    for model in pair:
        torch.manual_seed(0)
        made.append(model.generate(**given, max_new_tokens=6, min_new_tokens=6, **how))
    assert torch.equal(*made)


def test_hidden_states_are_still_recorded(pair):
    given = sample_tokens(128, 2, 5, 1)
    states = [model(**given, output_hidden_states=True).hidden_states for model in pair]
    assert len(states[0]) == len(states[1]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_training_with_checkpointing_gives_the_same_gradients(name):
    model = tiny.model(name)
    models = [model, bind(capture(copy.deepcopy(model)))]
    given = sample_tokens(128, 2, 5, 1)
    for m in models:
        m.train()
        m.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)  # several of them drop
        ids, mask = given["input_ids"], given["attention_mask"]
        m(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad))


def test_checkpointing_recomputes_a_bound_layer_in_the_backward_pass():
    model = bind(capture(tiny.model("llama")))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    runs = []
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: runs.append(1))
    loss = model(**sample_tokens(128, 2, 5, 1), labels=sample_tokens(128, 2, 5, 1)["input_ids"]).loss
    assert len(runs) == 1
    loss.backward()
    assert len(runs) == 2


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_flat_graph_gives_the_models_logits_on_another_padded_shape(name):
    model = tiny.model(name)
    whole = full_model_unit(capture(model))
    given = sample_tokens(128, 3, 11, 3)
    values = {**given, "cache": DynamicCache(config=model.config)}
    with torch.no_grad():
        made = whole.function()(model, *(values[name] for name in whole.placeholders))
        assert torch.equal(made, model(**given).logits)


@pytest.mark.parametrize(("name", "programs"), [("llama", 1), ("gpt2", 1), ("gemma3_text", 2)])
def test_equal_layers_share_one_graph(name, programs):
    program = capture(tiny.model(name))
    assert len({id(unit.graph) for unit in program.units.values()}) == programs
    assert len({unit.key for unit in program.units.values()}) == programs


def test_a_layer_that_differs_in_one_attribute_has_its_own_graph():
    model = tiny.model("llama")
    model.model.layers[1].self_attn.scaling *= 2
    program = capture(model)
    assert len({unit.key for unit in program.units.values()}) == 2
    assert max_logit_difference(model, bind(program)) == 0.0


@pytest.mark.parametrize(
    "decide",
    [
        lambda self: [1.0, 2.0, 3.0][self.layer_idx],
        lambda self: 2.0 if self.layer_idx == 1 else 1.0,
        lambda self: 1.0 + self.layer_idx / 2,
        lambda self: {0: 1.0, 1: 2.0, 2: 3.0}[self.layer_idx],
        lambda self: 1.0 if self.layer_idx else 2.0,
        lambda self: float(self.layer_idx),
    ],
    ids=["list", "equal", "reckon", "dict", "truth", "float"],
)
def test_layers_that_decide_by_their_own_number_are_not_taken_for_equal(decide):
    model = tiny.model("llama")
    plain = type(model.model.layers[0].mlp)

    class Numbered(plain):
        def forward(self, x):
            return super().forward(x) * decide(self)

    Numbered.__module__ = plain.__module__
    for i, layer in enumerate(model.model.layers):
        layer.mlp.__class__ = Numbered
        layer.mlp.layer_idx = i
    reference = copy.deepcopy(model)
    assert max_logit_difference(reference, bind(capture(model))) == 0.0


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_backend_is_chosen_when_the_graph_runs(implementation):
    model = tiny.model("qwen2")
    bound = bind(capture(copy.deepcopy(model)))
    for m in (model, bound):
        m.set_attn_implementation(implementation)
    assert max_logit_difference(model, bound) == 0.0


@pytest.mark.parametrize(
    "name",
    wide(
        (*tiny.NAMES, "mixtral", "qwen3_moe", "gpt_oss", "jamba", "granitemoehybrid", "qwen3_next"),
        ("llama", "gpt2", "gemma3_text", "mixtral", "jamba"),
    ),
)
def test_the_meta_device_gives_the_same_programs(name):
    real = capture(tiny.model(name))
    with torch.device("meta"):
        empty = tiny.blank(name)
    program = capture(empty)
    assert [unit.key for unit in program.units.values()] == [unit.key for unit in real.units.values()]
    assert full_model_unit(program).key == full_model_unit(real).key
    assert skeleton_of(program) == skeleton_of(real)  # all that a plan reads


def test_literals_know_the_attribute_that_they_came_from():
    program = capture(tiny.model("phi3"))
    graph = program.units["model.layers.0"].graph
    sources = {source for node in graph.nodes for _, _, source in node.meta.get("ints", ())}
    assert "(config.num_attention_heads * self_attn.head_dim)" in sources
    assert "self_attn.head_dim" in sources


def test_a_source_expression_evaluates_to_the_literal_it_explains():
    width = (TracedInt(12, "mlp.width") * 2 - 4) // TracedInt(5, "layers.0.parts")
    assert (int(width), evaluate_expression(width.source, {"mlp.width": 12, "layers.0.parts": 5}.get)) == (4, 4)


@pytest.mark.parametrize("text", ["", "(", "(a", "(a + b", "(a / b)", "a b", "(a // 0)", "a; b", "f('os')"])
def test_a_text_that_is_no_source_expression_is_refused(text):
    with pytest.raises(ValueError):
        evaluate_expression(text, lambda path: 3)


def test_notes_on_nodes_are_plain_data():
    def plain(value):
        return isinstance(value, (int, str, type(None))) or (isinstance(value, tuple) and all(map(plain, value)))

    program = capture(tiny.model("qwen3"))
    nodes = [node for unit in (full_model_unit(program), *program.units.values()) for node in unit.graph.nodes]
    assert all(plain(value) for node in nodes for value in node.meta.values())
    assert {"attention", "rotary", "cache_update", "norm", "activation", "linear"} <= {
        node.meta.get("role") for node in nodes
    }


@pytest.mark.slow
def test_no_activation_outlives_the_capture():
    model = tiny.model("llama")
    gc.collect()
    before = {id(x) for x in gc.get_objects() if isinstance(x, torch.Tensor)}
    program = capture(model)
    assert full_model_unit(program)
    gc.collect()
    kept = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and id(x) not in before]
    assert {id(x) for x in kept} <= {id(x) for x in program.inputs.values()}


def test_analyses_are_made_once_per_version():
    program = capture(tiny.model("llama"))
    made = []

    def count(program):
        made.append(program.version)
        return len(made)

    assert (program.analysis(count), program.analysis(count)) == (1, 1)
    program.changed()
    assert program.analysis(count) == 2


def _state_of_the_world(model):
    files = [vars(f) for f in patches.modeling_modules(model.modules(), type(model).__module__)]
    configs = [{k: type(v) for k, v in vars(m.config).items()} for m in model.modules() if "config" in vars(m)]
    return (
        [dict(f) for f in files],
        configs,
        nn.Module.__call__,
        nn.Module.__getattr__,
        torch.arange,
        [{k: type(v) for k, v in vars(m).items()} for m in model.modules()],
    )


def test_everything_that_is_exchanged_while_tracing_is_put_back():
    model = tiny.model("gemma3_text").train()
    before = _state_of_the_world(model)
    assert full_model_unit(capture(model))
    assert _state_of_the_world(model) == before
    assert all(m.training for m in model.modules())


def test_a_module_that_cannot_be_traced_becomes_a_leaf_and_is_reported():
    model = tiny.model("llama")
    unlisted = model.model.layers[1].mlp

    class Broken(type(unlisted)):
        def forward(self, x):
            return super().forward(x).new_tensor(x.detach().numpy() * 0.5)

    Broken.__module__ = type(unlisted).__module__
    unlisted.__class__ = Broken
    program = capture(model)
    assert list(program.opaque) == ["model.layers.1.mlp"]
    assert "`numpy` gives a ndarray" in program.opaque["model.layers.1.mlp"]
    assert max_logit_difference(model, bind(program)) == 0.0


def test_a_mixer_that_keeps_a_state_in_the_cache_is_a_leaf():
    program = capture(tiny.model("mamba2"))
    assert list(program.opaque) == [f"backbone.layers.{i}.mixer" for i in range(3)]
    assert [
        node.target for node in program.units["backbone.layers.0"].graph.nodes if node.meta.get("role") == "ssm_scan"
    ] == ["mixer"]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_layers_are_also_called_on_another_shape_and_in_a_decode_step(name):
    model = tiny.model(name)
    path = list(capture(model).units)[1]
    first, other, step, plain = (
        call.free
        for call in [
            record_first_calls(model, sample_inputs(model)).first.popitem()[1],
            *record_further_unit_calls(model, sample_inputs(model), [path])[path],
        ]
    )
    assert list(first) == list(other) == list(step) and plain.keys() <= first.keys()
    shapes = [next(iter(free.values())).shape for free in (first, other, step)]
    assert shapes == [(2, 7, 64), (3, 11, 64), (2, 1, 64)]


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: sum(self.up(x[:, i : i + 1]) for i in range(x.shape[1])) + 0 * x,
        lambda self, x: self.up(x) if x.shape[1] > 8 else self.up(x) * 2,
        lambda self, x: self.up(x) if x.shape[1] > 1 else self.up(x) * 2,
        lambda self, x: self.up(x) if x.sum() > 0 else self.up(x) * 2,
        lambda self, x: self.up(x) * x.shape[0] if x.shape[0] % 2 else self.up(x),
        lambda self, x: self.up(x) * (x.amax().item() > 0),
    ],
    ids=["loop over length", "long", "decoding", "numbers", "batch", "item"],
)
def test_a_module_whose_operations_depend_on_sizes_or_numbers_becomes_a_leaf(forward):
    model = tiny.model("llama")
    old = model.model.layers[1].mlp

    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(64, 64)

    Fickle.forward = forward
    Fickle.__module__ = type(old).__module__
    model.model.layers[1].mlp = Fickle()
    reference = copy.deepcopy(model)
    program = capture(model)
    assert list(program.opaque) == ["model.layers.1.mlp"]
    assert max_logit_difference(reference, bind(program)) == 0.0


@pytest.mark.slow
def test_a_model_of_seventy_billion_is_one_program_and_no_memory():
    config = tiny.config(
        "llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    program = capture(model)
    assert len(program.units) == 80
    assert len({id(unit.graph) for unit in program.units.values()}) == 1
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_layer_that_cannot_be_captured_is_refused_with_its_path_and_line():
    model = tiny.model("llama")
    layer = model.model.layers[1]

    class Broken(type(layer)):
        def forward(self, hidden_states, **kwargs):
            return torch.from_numpy(super().forward(hidden_states, **kwargs).detach().numpy())

    Broken.__module__ = type(layer).__module__
    layer.__class__ = Broken
    with pytest.raises(Reject) as refused:
        capture(model)
    diagnostic = refused.value.diagnostics[0]
    assert diagnostic.slug == "unsupported-model"
    assert "a module of its own" in diagnostic.help, "says what can be done"
    assert "model.layers.1" in diagnostic.message and "numpy" in diagnostic.message


def test_an_argument_that_was_baked_is_not_ignored():
    model = bind(capture(tiny.model("llama")))
    with pytest.raises(Reject, match="compiled without `output_attentions`"):
        model(**sample_tokens(128, 2, 5, 1), output_attentions=True)


def test_a_copy_of_a_bound_model_runs_its_own_weights():
    model = bind(capture(tiny.model("llama")))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].mlp.up_proj.weight.zero_()
    assert max_logit_difference(model, twin) > 0.0
    for layer in twin.model.layers:
        assert layer.forward.__self__ is layer


def test_observations_of_the_same_model_are_equal():
    seen = [record_logits_of_sample_calls(tiny.model("llama")) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))

"""Plans of settings that change what an architecture computes, of pruned models, and of lowered ones."""

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.layers.linear import KernelLinear, count_params
from effc.compiler.runtimes.native.linears import NumberFormats
from effc.compiler.runtimes.native.plan_files import write_plan
from effc.compiler.runtimes.native.reader import Reader
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.compiler.transforms.editing.scan_removal import drop_scan
from effc.dsl.checker.values import Ratio
from effc.dsl.syntax.diagnostics import Reject
from effc.kernels.native import KernelError
from effc.kernels.packed import kernel_of
from effc.kernels.packed_linear import unpack_packed_weight

from tests import mixers, tiny
from tests.compiler.runtimes.native.test_plans import ATOL, halved, made, naive, rows_of
from tests.grids import wide
from tests.passes.test_prune import SCORE, pruned

torch.set_num_threads(1)


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


VARIANTS = [
    (
        "llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    ("llama", rope("linear", factor=4.0)),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"hidden_act": "gelu_new"}),
    ("llama", {"hidden_act": "quick_gelu"}),
    ("phi3", rope("default", partial_rotary_factor=0.5)),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.05,
            "logits_scaling": 8.0,
        },
    ),
    ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    ("cohere", {"use_qk_norm": True}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
]


def assert_same(model, engine, length=14):
    ids = torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(2))
    found = engine.run(ids[0].tolist(), [0] * length, [True] * length)
    assert torch.allclose(found, rows_of(model, ids, torch.ones_like(ids))[0], atol=ATOL, rtol=1e-4)


@pytest.mark.parametrize("name,changes", VARIANTS, ids=lambda x: x if isinstance(x, str) else "+".join(x))
def test_a_plan_follows_what_a_config_changes(name, changes):
    model = halved(tiny.model(name, **changes))
    assert_same(model, naive(capture(model)))


def test_frequencies_that_change_with_the_length_end_the_context_where_they_change():
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 32}
    model = halved(tiny.model("phi3", **rope("longrope", **factors), original_max_position_embeddings=32))
    engine = naive(capture(model))
    assert engine.plan["context"] == 32
    assert_same(model, engine)


@pytest.mark.parametrize(
    "name", wide(["llama", "gpt2", "qwen3", "phi3", "gpt_neox", "gemma2"], {"gpt2", "gemma2", "gpt_neox"})
)
@pytest.mark.parametrize("word,args", [("prune.blocks", {"remove": 2}), ("shed.blocks", {})], ids=["blocks", "layers"])
def test_a_model_without_some_blocks_runs_as_what_is_left(tmp_path, name, word, args):
    program = _without_blocks(tmp_path, name) if word == "prune.blocks" else _without_layer(name)
    model = program.model
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = torch.nn.Parameter(parameter.bfloat16().float(), requires_grad=False)
    assert_same(model, naive(program))


def _without_blocks(tmp_path, name):
    return pruned(tmp_path, tiny.model(name), "prune.blocks", remove=2)


def _without_layer(name):
    program = capture(tiny.model(name))
    with Rewriter(program) as rewriter:
        rewriter.drop_layer(list(program.units)[1])
    return program


@pytest.mark.parametrize("name", ["mamba2", "mamba", "bamba"])
def test_a_mixer_without_its_scan_convolves_and_that_is_all(name):
    model = made(name)
    program = capture(model)
    with Rewriter(program) as rewrite:
        drop_scan(program, rewrite, skeleton_of(program).scans[0])
    engine = naive(program)
    ops = [s["op"] for s in engine.plan["steps"]]
    assert ops.count("convolve") == ops.count("ssd") + ops.count("selective") + 1
    assert_same(model, engine)


def test_a_hybrid_whose_experts_are_one_mlp_runs():
    assert_same(*_pair(mixers.model("granitemoehybrid", num_local_experts=0)))


def _pair(model):
    model = halved(model)
    return model, naive(capture(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_channels_of_uneven_widths_run_as_they_are(tmp_path, name):
    model = halved(tiny.model(name))
    program = pruned(tmp_path, model, "prune.channels", keep=Ratio(0.6, "channels"), align=8, score=SCORE, repair=False)
    engine = naive(program)
    widths = {engine.plan["registers"][s["to"]] for s in engine.plan["steps"] if s["op"] == "act"}
    assert len(widths) > 1
    assert_same(program.model, engine)


def test_layers_of_different_heads_run_as_they_are(tmp_path):
    model = halved(tiny.model("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8))
    program = pruned(tmp_path, model, "prune.heads", keep=Ratio(0.7, "heads"), score=SCORE, repair=False)
    engine = naive(program)
    assert len({s["heads"] for s in engine.plan["steps"] if s["op"] == "attention"}) > 1
    assert_same(program.model, engine)


def test_lowered_layers_keep_their_packed_weights():
    model = halved(tiny.model("llama"))
    kernels = {
        "q_proj": "sparse_linear_int8",
        "k_proj": "dense_linear_int8",
        "up_proj": "sparse_linear",
        "down_proj": "block_sparse_linear",
    }
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, kernel in kernels.items():
                if name in dict(part.named_children()):
                    setattr(part, name, KernelLinear.of(getattr(part, name), kernel))
    plan = Reader(capture(model), "bf16").build_plan()
    made = {name: entry.make() for name, entry in plan.live_weight_entries().items()}
    own = dict(model.named_modules())
    for name, tensor in made.items():
        module = own.get(name.removesuffix(".weight"))
        if isinstance(module, KernelLinear):
            assert tensor.data_ptr() == module.packed.data_ptr()
    assert sum(isinstance(m, KernelLinear) for m in own.values()) == 12


def test_a_tied_head_that_was_lowered_is_counted_once_and_holds_the_embedding_too():
    model, same = (halved(tiny.model("llama", tie_word_embeddings=True)) for _ in range(2))
    whole = count_params(model)
    model.lm_head = KernelLinear.of(model.lm_head, "dense_linear")
    assert count_params(model) == whole
    plan = Reader(capture(model), "bf16").build_plan()
    (embedding,) = [s for s in plan.steps if s["op"] == "embedding"]
    assert embedding["table"] == "lm_head.weight"
    assert_same(same, naive(capture(model)))
    model.lm_head = KernelLinear.of(halved(tiny.model("llama", seed=1)).lm_head, "dense_linear")  # other numbers
    (embedding,) = [s for s in Reader(capture(model), "bf16").build_plan().steps if s["op"] == "embedding"]
    assert embedding["table"] != "lm_head.weight"


def test_int8_changes_weights_and_no_step():
    program = capture(halved(tiny.model("gemma2", tie_word_embeddings=False)))
    plans = [Reader(program, weights).build_plan().to_json() for weights in ("bf16", "int8")]
    assert plans[0] == plans[1]


def test_int8_is_asked_for_by_the_target_and_packs_what_is_not_lowered():
    model = tiny.model("gpt2")
    plan = Reader(capture(model), "int8").build_plan()
    packed = plan.entries["transformer.h.0.attn.c_attn.weight"].make()
    weight = model.transformer.h[0].attn.c_attn.weight.T
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((unpack_packed_weight(packed) - weight) / step).abs().max() <= 0.5001  # rounding to the nearest code


def test_inputs_of_16_bits_are_those_of_all_int8_layers_which_hold_the_bytes_that_they_held():
    program, stored = capture(tiny.model("gpt2")), {}
    for inputs in ("int8", "int16"):
        plan = Reader(program, NumberFormats.from_target_arguments("int8", inputs, 64, "auto")).build_plan()
        stored[inputs] = {n: e.make() for n, e in plan.entries.items() if e.kind == "packed"}
    assert stored["int8"].keys() == stored["int16"].keys() and len(stored["int8"]) > 1
    for name, packed in stored["int16"].items():
        assert kernel_of(packed) == "dense_linear_int8_int16"
        assert torch.equal(packed[128:], stored["int8"][name][128:])  # behind the header


def test_a_head_of_its_own_numbers_is_left_to_them_beside_inputs_of_16_bits():
    numbers = [
        NumberFormats.from_target_arguments("int8", "int16", 64, head).of_head
        for head in ("auto", "int8", "bf16", "int4")
    ]
    assert numbers == ["int8_int16", "int8_int16", "bf16", "int4"]
    assert NumberFormats.from_target_arguments("int4", "int8", 64, "auto").of_head == "int8"


def test_an_activation_that_no_step_computes_is_refused():
    with pytest.raises(Reject, match=r"model\.layers\.0\.mlp\.act_fn .*elementwise function"):
        Reader(capture(tiny.model("llama", hidden_act="mish")), "bf16").build_plan()


def test_a_function_written_out_in_the_model_is_one_step():
    model = halved(tiny.model("llama"))

    import transformers.models.llama.modeling_llama as source

    class Mlp(source.LlamaMLP):
        def forward(self, x):
            gate = self.gate_proj(x)
            gate = 0.5 * gate * (1.0 + torch.tanh(0.7978845608028654 * (gate + 0.044715 * torch.pow(gate, 3.0))))
            return self.down_proj(gate * self.up_proj(x))

    Mlp.__module__ = source.__name__
    for layer in model.model.layers:
        layer.mlp.__class__ = Mlp
    program = capture(model)
    engine = naive(program)
    assert [step["kind"] for step in engine.plan["steps"] if step["op"] == "act"] == ["gelu_tanh"] * 3
    assert_same(model, engine)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path, number):
    model = tiny.model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = number
    with pytest.raises(KernelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: .*NaN or infinite"):
        write_plan(Reader(capture(model), "bf16").build_plan(), tmp_path, {})
    assert not (tmp_path / "plan.json").exists()

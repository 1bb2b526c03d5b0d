"""`onnx(weights: nbits)`: the codes that a quantiser left, as ONNX Runtime's own operator multiplies them."""

import json

import numpy as np
import pytest
import torch
from effc.compiler.artifacts.diff import diff_artifacts
from effc.compiler.artifacts.load import load, load_to_judge
from effc.compiler.artifacts.manifest import read_manifest
from effc.compiler.artifacts.verify import verify_forms
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.compiler.evaluation.metrics.bytes import Bytes
from effc.compiler.evaluation.metrics.params import Params
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.onnx.checking import graphs_in, load_initializers, read_checked_onnx
from effc.compiler.runtimes.onnx.nbits import block_size, nbits_bytes, pack_nbits
from effc.compiler.targets.onnx import Onnx
from effc.dsl.syntax.diagnostics import Reject
from effc.kernels.codes import codes_if_on_grid
from effc.kernels.grid import Grid
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification

from tests import tiny, worlds
from tests.quantised import quantised
from tests.recipes_in_memory import context_of, recipe_of

pytestmark = pytest.mark.slow

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
torch.set_num_threads(1)
WIDE = {"intermediate_size": 128}  # so that groups of 32 and 64 divide


def emitted(tmp_path, program, **options):
    target, folder = Onnx(path="o", weights="nbits", **options), tmp_path / "o"
    folder.mkdir(parents=True)
    target.emit(program, folder, context_of(tmp_path, program.model, recipe_of([])))
    return folder, target


def attributes_of(node) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def nibbles(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes of the last axis, by the operator's text: of four bits the first lie in the low half of a byte."""
    return packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def dequantised(codes, scales, zero_points, k: int, bits: int) -> np.ndarray:
    """A dense weight [n, k] by the operator's text: (code - zero point) * scale, block by block."""
    n, blocks = scales.shape
    zero = np.full((n, blocks), 1 << (bits - 1)) if zero_points is None else nibbles(zero_points, bits)[:, :blocks]
    steps = nibbles(codes, bits).astype(np.int64) - zero[:, :, None]
    return (steps.astype(np.float32) * scales[:, :, None]).reshape(n, -1)[:, :k]


def weights_in(folder) -> dict[str, np.ndarray]:
    """Dense weights of the nodes in a file, by the path of their module."""
    stored = read_checked_onnx(folder / "onnx")
    tensors = {name: tensor.numpy() for name, tensor in load_initializers(folder / "onnx", stored).items()}
    result = {}
    for node in stored.model.graph.node:
        if node.op_type == "MatMulNBits":
            facts, (codes, scales, *zero) = attributes_of(node), [tensors[name] for name in node.input[1:]]
            path = node.input[1].removeprefix("model.").removesuffix(".weight_codes")
            result[path] = dequantised(codes, scales, zero[0] if zero else None, facts["K"], facts["bits"])
    return result


@given(
    n=st.integers(1, 5),
    groups=st.integers(1, 5),
    group=st.sampled_from([0, 16, 32, 48, 80, 128, 256]),
    bits=st.integers(2, 8),
    middle=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_blocks_hold_the_codes_of_any_grid_by_the_operators_text(n, groups, group, bits, middle, seed):
    k = groups * (group or 37)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    grid = Grid(bits, group, middle, False)
    weight = grid.fit_scales(weight).round(weight)
    stored_bits = 4 if bits <= 4 else 8
    codes, block = codes_if_on_grid(weight, group, stored_bits, middle), block_size(group, k)
    packed = pack_nbits(codes, stored_bits, block, k)
    zero_points = packed.zero_points
    parts = [packed.codes, packed.scales, *([] if zero_points is None else [zero_points])]
    assert torch.equal(
        torch.from_numpy(
            dequantised(
                *(None if p is None else p.numpy() for p in (packed.codes, packed.scales, zero_points)), k, stored_bits
            )
        ),
        weight,
    )
    assert not middle or zero_points is None
    assert sum(part.nbytes for part in parts) == nbits_bytes(n, k, stored_bits, block, zero_points is None)


@pytest.mark.parametrize(("group", "block"), [(24, None), (8, None), (16, 16), (96, 32), (512, 128)])
def test_a_block_is_the_largest_power_of_two_that_divides_a_group(group, block):
    assert block_size(group, 2 * group) == block


@pytest.mark.parametrize(("k", "block"), [(5, 16), (64, 64), (96, 128), (1000, 128)])
def test_rows_that_share_a_scale_are_cut_into_blocks_and_the_last_is_filled(k, block):
    assert block_size(0, k) == block


@pytest.mark.parametrize(
    "grid",
    [
        Grid(4, 32, True, True),
        Grid(4, 64, False, True),
        Grid(3, 0, False, False),
        Grid(8, 32, True, True),
        Grid(6, 0, False, False),
    ],
    ids=["int4", "int4-free", "int3-rows", "int8", "int6-free-rows"],
)
def test_weights_in_the_file_are_the_programs_bit_for_bit_and_onnx_runtime_multiplies_by_them(tmp_path, grid):
    program = quantised(tiny.model("llama", **WIDE), {"_proj": grid})
    folder, target = emitted(tmp_path, program)
    weights = weights_in(folder)
    assert len(weights) == 21
    for path, weight in weights.items():
        assert np.array_equal(weight, program.model.get_submodule(path).weight.detach().numpy()), path
    checks = verify_forms(folder, program.model, target.forms())
    assert len(checks) == 6 and all(
        check.holds and check.tolerance <= 1e-3 for check in checks if "logits" in check.what
    )


def test_inputs_of_products_stay_in_float32_unless_the_recipe_rounds_them(tmp_path):
    folder, _ = emitted(tmp_path, quantised(tiny.model("llama", **WIDE), {"_proj": Grid(4, 32, True, True)}))
    nodes = [n for n in read_checked_onnx(folder / "onnx").model.graph.node if n.op_type == "MatMulNBits"]
    assert {attributes_of(n)["accuracy_level"] for n in nodes} == {0} and {n.domain for n in nodes} == {"com.microsoft"}
    assert all(len(n.input) == 3 for n in nodes)  # 0 is the middle code, which is the operator's default


def test_dynamic_int8_rounds_what_the_codes_multiply_and_the_other_matrices_and_what_that_loses_is_reported(tmp_path):
    program = quantised(tiny.model("llama", **WIDE), {"_proj": Grid(4, 32, True, True)})
    folder, target = emitted(tmp_path, program, dynamic="int8")
    graph = read_checked_onnx(folder / "onnx").model.graph
    nodes = [n for n in graph.node if n.op_type == "MatMulNBits"]
    assert len(nodes) == 21 and {attributes_of(n)["accuracy_level"] for n in nodes} == {4}
    assert any(n.op_type == "MatMulInteger" for n in graph.node)  # the head
    checks = verify_forms(folder, program.model, target.forms())
    assert all(check.holds for check in checks) and "int8 itself is off by " in checks[0].reason


def test_modules_on_no_grid_and_those_that_share_their_weight_stay_dense(tmp_path):
    model = tiny.model("llama", tie_word_embeddings=True, **WIDE)
    program = quantised(model, {"up_proj": Grid(4, 32, True, True), "lm_head": Grid(4, 32, True, True)})
    folder, target = emitted(tmp_path, program)
    assert sorted(weights_in(folder)) == [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    notes = json.loads((folder / "notes.json").read_text())
    assert any("`lm_head` stays dense: another module has its weight" in note for note in notes)
    assert all(check.holds for check in verify_forms(folder, model, target.forms()))


def test_a_model_in_bfloat16_keeps_the_codes_of_its_grid(tmp_path):
    model = tiny.model("llama", **WIDE)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    program = quantised(model, {"_proj": Grid(4, 32, True, True)})
    folder, target = emitted(tmp_path, program)
    for path, weight in weights_in(folder).items():
        assert torch.equal(torch.from_numpy(weight).bfloat16(), model.get_submodule(path).weight), path
    assert all(check.holds for check in verify_forms(folder, model, target.forms()))
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)  # as it was


def test_biases_are_added_behind_the_product(tmp_path):
    model = tiny.model("qwen2", **WIDE)
    assert model.model.layers[0].self_attn.q_proj.bias.abs().max() > 0
    program = quantised(model, {"_proj": Grid(4, 32, False, True)})
    folder, target = emitted(tmp_path, program)
    assert len(verify_forms(folder, model, target.forms())) == 6


def test_a_vision_model_keeps_the_codes_of_its_grid(tmp_path):
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8
    )
    model = tiny.randomize(ViTForImageClassification(config).eval())
    program = quantised(model, {"": Grid(4, 32, True, True)})
    folder, target = emitted(tmp_path, program)
    weights = weights_in(folder)
    assert len(weights) == 13
    for path, weight in weights.items():
        assert np.array_equal(weight, model.get_submodule(path).weight.detach().numpy()), path
    assert all(check.holds for check in verify_forms(folder, model, target.forms()))


def test_all_three_graphs_of_an_encoder_with_a_decoder_have_the_codes(tmp_path):
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    tokens = {"vocab_size": 128, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    model = tiny.randomize(T5ForConditionalGeneration(T5Config(**sizes, **tokens)).eval())
    folder, target = emitted(tmp_path, quantised(model, {"": Grid(4, 32, True, True)}))
    counts = [read_checked_onnx(folder / "onnx", name).operators["MatMulNBits"] for name in graphs_in(folder / "onnx")]
    assert counts == [6, 10, 8]  # the last one reads the source's keys and values from its cache
    checks = verify_forms(folder, model, target.forms())
    assert len(checks) == 6 and all(check.holds for check in checks)


# -- what is refused ----------------------------------------------------------------------------------------


def test_a_model_without_a_grid_is_refused(tmp_path):
    with pytest.raises(Reject) as refused:
        emitted(tmp_path, capture(tiny.model("llama")))
    (fault,) = refused.value.diagnostics
    assert fault.slug == "nothing-quantized" and "`weights: nbits` rounds none" in fault.message


def test_groups_that_no_block_divides_are_refused_with_the_module(tmp_path):
    program = quantised(tiny.model("llama", intermediate_size=72), {"layers.0.mlp.down_proj": Grid(4, 24, True, True)})
    with pytest.raises(Reject) as refused:
        emitted(tmp_path, program)
    (fault,) = refused.value.diagnostics
    assert fault.slug == "unfit-grid" and "`model.layers.0.mlp.down_proj` is quantised in groups of 24" in fault.message


def test_a_weight_that_left_its_grid_is_named(tmp_path):
    program = quantised(tiny.model("llama", **WIDE), {"_proj": Grid(4, 32, True, True)})
    with torch.no_grad():
        program.model.model.layers[1].mlp.up_proj.weight[0, 0] += 0.01
    with pytest.raises(Reject) as refused:
        emitted(tmp_path, program)
    (fault,) = refused.value.diagnostics
    assert fault.slug == "unfit-grid" and "`model.layers.1.mlp.up_proj`" in fault.message


RECIPE = """effspec 1
model base = zoo("tiny-llama")
pipeline small(base) {{ {steps} }}
emit small {{ {targets} }}
"""


@pytest.mark.parametrize(
    ("steps", "slug", "words"),
    [
        ("", "nothing-quantized", "`weights: nbits` rounds none"),
        ('q = quantize.round(on: "*_proj", bits: 4, group: 8)', "unfit-grid", "in groups of 8 inputs"),
    ],
)
def test_recipes_that_could_not_be_written_are_refused_in_the_plan_with_a_caret(tmp_path, steps, slug, words):
    (tmp_path / "r.effspec").write_text(RECIPE.format(steps=steps, targets='onnx("o", weights: nbits)'))
    with pytest.raises(Reject, match=words) as refused:
        api.plan_all_pipelines(api.open_session(tmp_path / "r.effspec", settings=Settings(tmp_path / "cache")))
    (fault,) = [d for d in refused.value.diagnostics if d.severity == "error"]
    assert fault.slug == slug and fault.span is not None and fault.exit == 3


# -- a whole compile ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Folder with the artifacts `dense` and `small` of one pipeline, whose model has a tokenizer."""
    folder = tmp_path_factory.mktemp("nbits")
    worlds.tokenizer(worlds.llama(folder / "llama", intermediate_size=96, tie_word_embeddings=False))
    steps = "q = quantize.round(bits: 4, group: 0)"
    targets = 'onnx("dense")  onnx("small", weights: nbits)'
    recipe = RECIPE.format(steps=steps, targets=targets).replace('zoo("tiny-llama")', 'hf("./llama")')
    (folder / "r.effspec").write_text(recipe)
    api.compile(folder / "r.effspec", folder, cache_dir=folder / "cache", threads=1)
    return folder


def test_an_artifact_of_codes_runs_inspects_verifies_and_compares_from_the_command_line(compiled, capsys):
    from effc.compiler.cli.main import main

    small = str(compiled / "small")
    assert main(["run", small, "--prompt", "In the beginning", "-n", "4"]) == 0
    assert main(["inspect", small]) == 0
    assert "14 MatMulNBits" in capsys.readouterr().out
    assert main(["verify", small]) == 0
    assert main(["diff", str(compiled / "dense"), small]) == 0


def test_the_artifact_is_smaller_and_its_card_says_why(compiled):
    dense, small = (read_manifest(compiled / name) for name in ("dense", "small"))
    assert small.bytes < 0.75 * dense.bytes  # both have a tokenizer
    assert any("14 linear modules are codes of `MatMulNBits`" in note for note in small.notes)
    assert "bytes" in {row.what for row in diff_artifacts(compiled / "dense", compiled / "small").rows}


def test_codes_and_dense_weights_of_one_pipeline_give_the_logits_of_each_other(compiled):
    dense, small = (load(compiled / name) for name in ("dense", "small"))
    ids = torch.arange(2, 26).view(2, 12)
    expected, actual = dense(ids).logits, small(ids).logits
    assert torch.allclose(actual, expected, atol=1e-4 * float(expected.abs().max()))  # another order of sums
    assert torch.equal(dense.generate(ids, max_new_tokens=12), small.generate(ids, max_new_tokens=12))


def test_parameters_and_bytes_of_an_artifact_of_codes_are_counted(compiled):
    dense, small = (load_to_judge(compiled / name, "cpu") for name in ("dense", "small"))
    assert Params().measure(small, None) == Params().measure(dense, None)
    stored = read_checked_onnx(compiled / "small" / "onnx")
    expected = sum(t.nbytes for t in load_initializers(compiled / "small" / "onnx", stored).values())
    assert Bytes().measure(small, None) == expected

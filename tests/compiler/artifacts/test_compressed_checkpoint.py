"""`hf(format: compressed)`: the codes that a quantiser left, as transformers reads them with compressed-tensors."""

import json
import subprocess
import sys

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from effc.compiler.artifacts.diff import diff_artifacts
from effc.compiler.artifacts.load import load, load_to_judge
from effc.compiler.artifacts.manifest import read_manifest
from effc.compiler.artifacts.verify import verify_forms
from effc.compiler.core import environment
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.compiler.evaluation.metrics.bytes import Bytes
from effc.compiler.evaluation.metrics.params import Params
from effc.compiler.ir.capture.capture import capture
from effc.compiler.models.checkpoints.pack_quantized import Scheme
from effc.compiler.targets.hf import Hf
from effc.dsl.syntax.diagnostics import Reject
from effc.kernels.grid import Grid
from safetensors.torch import load_file

from tests import tiny, worlds
from tests.quantised import quantised
from tests.recipes_in_memory import context_of, recipe_of

torch.set_num_threads(1)
WIDE = {"intermediate_size": 128}  # so that groups of 32 and 64 divide
RECIPE = """effspec 1
model base = {model}
data rows = synthetic(2, length: 16, seed: 1)
pipeline small(base) {{ {steps} }}
emit small {{ {targets} }}
"""


def in_dtype(model, dtype):
    """The model with parameters of a type, and buffers as `from_pretrained` leaves them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def emitted(tmp_path, program, **options):
    target, folder = Hf(path="h", format="compressed", **options), tmp_path / "h"
    folder.mkdir(parents=True)
    target.emit(program, folder, context_of(tmp_path, program.model, recipe_of([])))
    return folder, target


def read_as_compressed_tensors(folder):
    """Dense weights of the packed modules, by compressed-tensors' own reading of config and tensors."""
    stored = load_file(folder / "model" / "model.safetensors")
    config = QuantizationConfig.model_validate(
        json.loads((folder / "model/config.json").read_text())["quantization_config"]
    )
    compressor = BaseCompressor.get_value_from_registry(config.format)
    weights = {}
    for name in stored:
        path, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            assert path not in config.ignore
            named = [g for g in config.config_groups.values() if path in g.targets]
            (scheme,) = named or config.config_groups.values()
            parts = {key.rpartition(".")[2]: t for key, t in stored.items() if key.startswith(f"{path}.weight")}
            weights[path] = compressor.decompress(parts, scheme)["weight"]
    return weights, config, stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "grid",
    [
        Grid(4, 32, True, True),
        Grid(4, 64, False, True),
        Grid(3, 0, True, False),
        Grid(8, 32, True, True),
        Grid(6, 0, False, False),
    ],
    ids=["int4", "int4-free", "int3-rows", "int8", "int6-free-rows"],
)
@pytest.mark.slow
def test_codes_on_disk_are_those_of_the_grid(tmp_path, grid, dtype):
    program = quantised(in_dtype(tiny.model("llama", **WIDE), dtype), {"_proj": grid})
    folder, target = emitted(tmp_path, program)
    weights, config, stored = read_as_compressed_tensors(folder)
    assert len(weights) == 21 and config.ignore == ["lm_head"]
    for path, weight in weights.items():
        assert torch.equal(weight, program.model.get_submodule(path).weight), path
        assert f"{path}.weight" not in stored
    assert all(check.holds for check in verify_forms(folder, program.model, target.forms()))


@pytest.mark.slow
def test_several_grids_are_several_groups_and_the_rest_stands_in_ignore(tmp_path):
    grids = {"self_attn.q_proj": Grid(8, 32, True, True), "mlp.up_proj": Grid(4, 64, True, True)}
    program = quantised(tiny.model("llama", **WIDE), grids)
    folder, target = emitted(tmp_path, program)
    weights, config, stored = read_as_compressed_tensors(folder)
    assert sorted(weights) == sorted(f"model.layers.{i}.{end}" for i in range(3) for end in grids)
    assert [g.weights.num_bits for g in config.config_groups.values()] == [8, 4]
    assert len(config.ignore) == 5 * 3 + 1 and all(f"{path}.weight" in stored for path in config.ignore)
    assert all(check.holds for check in verify_forms(folder, program.model, target.forms()))


@pytest.mark.slow
def test_a_module_that_shares_its_weight_stays_dense_and_is_named(tmp_path):
    model = tiny.model("llama", tie_word_embeddings=True, **WIDE)
    folder, target = emitted(
        tmp_path, quantised(model, {"up_proj": Grid(4, 32, True, True), "lm_head": Grid(4, 32, True, True)})
    )
    assert "lm_head" not in read_as_compressed_tensors(folder)[0]
    assert any(
        "`lm_head` stays dense: another module has its weight" in note
        for note in json.loads((folder / "notes.json").read_text())
    )
    assert all(check.holds for check in verify_forms(folder, model, target.forms()))


def test_a_model_that_came_quantised_is_packed_without_a_step(tmp_path):
    program = quantised(tiny.model("llama", **WIDE), {"_proj": Grid(4, 32, False, True)})
    program.notes.clear()
    folder, _ = emitted(tmp_path, program)
    assert len(read_as_compressed_tensors(folder)[0]) == 21


# -- what is refused ----------------------------------------------------------------------------------------


def refusal(tmp_path, program, **options):
    with pytest.raises(Reject) as refused:
        emitted(tmp_path, program, **options)
    return refused.value.diagnostics


@pytest.mark.slow
def test_a_model_without_a_grid_is_refused(tmp_path):
    (fault,) = refusal(tmp_path, capture(tiny.model("llama")))
    assert fault.slug == "nothing-quantized" and "quantize.gptq" in fault.help


@pytest.mark.slow
def test_several_grids_whose_zero_lies_anywhere_are_refused_since_transformers_reads_one(tmp_path):
    grids = {"q_proj": Grid(8, 32, True, True), "up_proj": Grid(4, 64, False, True)}
    (fault,) = refusal(tmp_path, quantised(tiny.model("llama", **WIDE), grids))
    assert fault.slug == "unfit-grid" and "zero: middle" in fault.help
    assert "`model.layers.0.self_attn.q_proj` and `model.layers.0.mlp.up_proj`" in fault.message


def test_a_weight_that_left_its_grid_is_named(tmp_path):
    program = quantised(tiny.model("llama", **WIDE), {"_proj": Grid(4, 32, True, True)})
    with torch.no_grad():
        program.model.model.layers[1].mlp.up_proj.weight[0, 0] += 0.01
    (fault,) = refusal(tmp_path, program)
    assert fault.slug == "unfit-grid" and "`model.layers.1.mlp.up_proj`" in fault.message


def test_scales_that_the_models_type_has_not_are_named(tmp_path):
    model = tiny.model("llama", **WIDE)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-5)
    program = quantised(model, {"layers.0.mlp.up_proj": Grid(4, 32, True, True)})
    model.half()
    slugs = {fault.slug for fault in refusal(tmp_path, program)}
    assert slugs == {"unfit-grid"}


def plan(tmp_path, steps, target, model='zoo("tiny-llama")'):
    (tmp_path / "r.effspec").write_text(RECIPE.format(model=model, steps=steps, targets=target))
    return api.plan_all_pipelines(api.open_session(tmp_path / "r.effspec", settings=Settings(tmp_path / "cache")))


@pytest.mark.parametrize(
    ("steps", "target", "slug", "words"),
    [
        ("", 'hf("h", format: compressed)', "nothing-quantized", "nothing is quantised"),
        (
            "q = quantize.round(bits: 4, group: 32)",
            'hf("h", form: compact, format: compressed)',
            "",
            "shapes of a config",
        ),
        (
            "c = prune.channels(keep: 60% of channels, score: perplexity(rows))\nq = quantize.round(bits: 4, group: 32)",
            'hf("h", format: compressed)',
            "cannot-hold",
            "can't hold the uneven widths that `c` makes",
        ),
    ],
)
def test_recipes_that_could_not_be_written_are_refused_with_a_caret(tmp_path, steps, target, slug, words):
    with pytest.raises(Reject, match=words) as refused:
        plan(tmp_path, steps, target)
    fault = next(d for d in refused.value.diagnostics if d.severity == "error")
    assert (not slug or fault.slug == slug) and fault.span is not None and fault.exit == 3


def test_a_missing_package_is_named_with_its_extra_before_passes_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(Reject) as refused:
        plan(tmp_path, "q = quantize.round(bits: 4, group: 32)", 'hf("h", format: compressed)')
    (fault,) = refused.value.diagnostics
    assert fault.slug == "package-missing" and fault.help == 'pip install "effc[compressed]"' and fault.span is not None


def test_a_version_outside_the_range_is_named(tmp_path, monkeypatch):
    old = environment.Package("compressed-tensors", ">=0.15", "compressed", "0.9.0")
    monkeypatch.setattr(environment, "required_packages_with_state", lambda: [old])
    with pytest.raises(Reject, match=r"compressed-tensors 0\.9\.0 is installed, effc needs >=0\.15"):
        plan(tmp_path, "q = quantize.round(bits: 4, group: 32)", 'hf("h", format: compressed)')


# -- a whole compile ----------------------------------------------------------------------------------------

READ = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
logits = model(input_ids=torch.arange(2, 26).view(2, 12)).logits.detach()
torch.save(logits, sys.argv[2])
assert not any(name.split(".")[0] == "effc" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Folder with the artifacts `dense` and `small` of one pipeline."""
    folder = tmp_path_factory.mktemp("compressed")
    steps = "q = quantize.round(bits: 4, group: 32, zero: middle)"
    targets = 'hf("dense")  hf("small", format: compressed)'
    (folder / "r.effspec").write_text(RECIPE.format(model='zoo("tiny-llama")', steps=steps, targets=targets))
    api.compile(folder / "r.effspec", folder, cache_dir=folder / "cache", threads=1)
    return folder


@pytest.mark.slow
def test_transformers_alone_computes_the_logits_of_the_dense_artifact(compiled, tmp_path):
    logits = {}
    for name in ("dense", "small"):
        arguments = [str(compiled / name / "model"), str(tmp_path / name)]
        subprocess.run([sys.executable, "-c", READ, *arguments], check=True, capture_output=True, timeout=240)
        logits[name] = torch.load(tmp_path / name, weights_only=True)
    # The weights are equal bit for bit; BLAS may block sums otherwise where memory is aligned otherwise.
    assert torch.allclose(logits["dense"], logits["small"], atol=1e-5 * float(logits["dense"].abs().max()))


def test_the_artifact_is_smaller_and_says_what_it_is(compiled):
    dense, small = (read_manifest(compiled / name) for name in ("dense", "small"))
    assert small.bytes < 0.5 * dense.bytes
    assert any("pack-quantized" in note for note in small.notes)
    assert all(check.tolerance >= check.worst for check in small.checks) and small.checks
    assert "pack-quantized" in (compiled / "small" / "README.md").read_text()
    rows = {row.what for row in diff_artifacts(compiled / "dense", compiled / "small").rows}
    assert "bytes" in rows


def test_effc_opens_it_with_equal_weights_and_counts_its_stored_bytes(compiled):
    dense, small = (load(compiled / name) for name in ("dense", "small"))
    assert all(torch.equal(a, b) for a, b in zip(dense.state_dict().values(), small.state_dict().values(), strict=True))
    judged = load_to_judge(compiled / "small", "cpu")
    stored = load_file(compiled / "small/model/model.safetensors")
    assert Bytes().measure(judged, None) == sum(t.nbytes for t in stored.values())
    assert Params().measure(judged, None) == Params().measure(dense, None)


def test_what_it_saves_again_is_an_ordinary_checkpoint(compiled, tmp_path):
    model = load(compiled / "small")
    model.save_pretrained(tmp_path / "model")
    assert "quantization_config" not in json.loads((tmp_path / "model/config.json").read_text())
    again = load(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_bits_that_a_scheme_lacks_take_the_next():
    assert Scheme.smallest_for_grid(2, 32, True) == Scheme(4, 32, True) and Scheme.smallest_for_grid(
        5, 0, False
    ) == Scheme(8, 0, False)


@pytest.mark.slow
def test_tokens_come_from_a_folder_with_a_tokenizer(tmp_path):
    folder = worlds.llama(tmp_path / "llama", intermediate_size=64)
    worlds.tokenizer(folder)
    (tmp_path / "r.effspec").write_text(
        RECIPE.format(
            model='hf("./llama")', steps="q = quantize.round(bits: 8, group: 0)", targets='hf("h", format: compressed)'
        )
    )
    (result,) = api.compile(tmp_path / "r.effspec", tmp_path, cache_dir=tmp_path / "cache", threads=1)
    assert (result.artifacts[0].path / "model" / "tokenizer.json").is_file()

"""What the target `gguf` writes is computed again from the file alone, and by llama.cpp where that is installed."""

import json
import random
from importlib.util import find_spec

import pytest
import torch
from effc.compiler.artifacts.load import load
from effc.compiler.artifacts.verify import verify_forms
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.compiler.evaluation.metrics.bytes import Bytes
from effc.compiler.evaluation.metrics.params import Params
from effc.compiler.ir.capture.capture import capture
from effc.compiler.plugin.target import LoadRequest
from effc.compiler.runtimes.gguf.reading import read_gguf
from effc.compiler.runtimes.gguf.refusal import cannot_write_gguf
from effc.compiler.runtimes.onnx.refusal import cannot_write_onnx
from effc.compiler.targets.gguf import Gguf
from effc.dsl.syntax.diagnostics import EXITS, Reject
from effc.kernels.codes import codes_if_on_grid
from effc.kernels.grid import Grid

from tests import tiny, worlds
from tests.compiler.runtimes.modes import assert_generates_alike
from tests.recipes_in_memory import context_of, recipe_of

gguf = pytest.importorskip("gguf")
torch.set_num_threads(1)

# The first layer loses its MLP, the middle one its attention, the last one half of its heads.
CUT = {
    "pruned_attn_idx": [1],
    "pruned_mlp_idx": [0],
    "pruned_attn_width": {"0": 64, "1": 64, "2": 32},
    "pruned_mlp_width": {"0": 96, "1": 64, "2": 80},
}
RECIPE = """effspec 1
model base = hf("./llama")
pipeline slim(base) {
  cut = prune.apply("pruning_config.json")
}
emit slim {
  gguf("slim", type: f32)
}
"""
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def slim(tmp_path_factory):
    """An artifact of a Llama whose layers differ; it was verified when it was compiled."""
    folder = tmp_path_factory.mktemp("gguf")
    tiny.model("llama", vocab_size=worlds.VOCABULARY, max_position_embeddings=1024).save_pretrained(folder / "llama")
    worlds.tokenizer(folder / "llama", chat=CHAT)
    (folder / "pruning_config.json").write_text(json.dumps(CUT))
    (folder / "slim.effspec").write_text(RECIPE)
    (result,) = api.build(
        api.open_session(folder / "slim.effspec", settings=Settings(folder / "cache", threads=1)), folder
    )
    (artifact,) = result.artifacts
    return artifact


def emitted(tmp_path, model, **options):
    target, folder = Gguf(path="g", **options), tmp_path / "g"
    folder.mkdir(parents=True)
    target.emit(capture(model), folder, context_of(tmp_path, model, recipe_of([])))
    return folder, target


def test_layers_that_differ_are_written_as_deci_with_their_own_widths(slim):
    known = read_gguf(slim.path / "gguf" / "model.gguf").facts
    assert known["general.architecture"] == "deci"
    assert known["deci.attention.head_count"] == [4, 0, 2]
    assert known["deci.attention.head_count_kv"] == [2, 0, 1]
    assert known["deci.feed_forward_length"] == [32, 64, 80]  # 32 channels of zeros stand for no MLP


def test_a_fresh_process_computes_the_same_from_the_file_alone_and_llama_cpp_does(slim):
    checks = slim.manifest.checks
    assert len(checks) == 6 + 2 * (find_spec("llama_cpp") is not None) and all(check.holds for check in checks)
    assert any("logits of prefill and 31 decode steps" in check.what for check in checks)


def test_it_runs_inspects_and_verifies_from_the_command_line(slim, capsys):
    from effc.compiler.cli.main import main

    assert main(["run", str(slim.path), "--prompt", "In the beginning", "-n", "4"]) == 0
    assert main(["inspect", str(slim.path)]) == 0
    assert "layer 1: no attention, width 64" in capsys.readouterr().out
    assert main(["verify", str(slim.path)]) == 0


def test_other_readers_of_gguf_find_the_same_tensors(slim):
    ours = read_gguf(slim.path / "gguf" / "model.gguf")
    theirs = {t.name: t for t in gguf.GGUFReader(slim.path / "gguf" / "model.gguf").tensors}
    assert set(theirs) == set(ours.entries)
    for name, tensor in theirs.items():
        assert torch.equal(ours.read_tensor(name).flatten(), torch.from_numpy(tensor.data.copy()).flatten())


def test_changed_files_are_refused_and_read_nothing_beyond_their_end(slim, tmp_path):
    honest, path, draw = (slim.path / "gguf" / "model.gguf").read_bytes(), tmp_path / "model.gguf", random.Random(0)
    head = honest.index(b"token_embd.weight")
    for _ in range(120):
        data = bytearray(honest)
        for _ in range(draw.randint(1, 6)):
            data[draw.randrange(head + 2000)] = draw.randrange(256)
        path.write_bytes(data[: draw.choice([len(data), draw.randrange(len(data))])])
        try:
            read_gguf(path)
        except Reject as refused:
            assert refused.diagnostics[0].slug == "refused-gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little") * 2)
    with pytest.raises(Reject, match="more tensors or keys than a model has"):
        read_gguf(path)


def test_a_type_of_model_that_has_no_gguf_is_refused_in_plan_whatever_steps_remove(tmp_path):
    recipe = tmp_path / "r.effspec"
    recipe.write_text(
        'effspec 1\nmodel base = zoo("tiny-mamba2")\ndata rows = generated(2, length: 32)\n'
        "pipeline p(base) { slim = prune.blocks(remove: 1, score: perplexity(rows)) }\n"
        'emit p { gguf("llamacpp") }\n'
    )
    with pytest.raises(Reject, match="effc writes no GGUF of `mamba2`") as refused:
        api.plan(recipe, cache_dir=tmp_path / "cache")
    assert refused.value.diagnostics[0].span.text == 'gguf("llamacpp")'


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gpt2", {}, "effc writes no GGUF of `gpt2`"),
        ("mistral", {}, "attention in windows"),
        ("llama", {"hidden_act": "gelu"}, "the activation `gelu`"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused_before_passes_run(tmp_path, name, changes, words):
    model = tiny.model(name, **changes)
    with pytest.raises(Reject, match=words) as refused:
        Gguf(path="g").foresee(context_of(tmp_path, model, recipe_of([])))
    assert "hold it" in refused.value.diagnostics[0].help


@pytest.mark.parametrize(("kind", "bits"), [("q8_0", 8.5), ("f16", 16)])
def test_bytes_are_those_of_the_file_and_params_those_of_the_model(tmp_path, kind, bits):
    model = tiny.model("llama", vocab_size=worlds.VOCABULARY)
    worlds.tokenizer(tmp_path)
    folder, _ = emitted(tmp_path, model, type=kind)
    opened = Gguf.open(folder / "gguf", LoadRequest())[0]
    assert Params().measure(opened, None) == Params().measure(model, None)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    rows = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert Bytes().measure(opened, None) == matrices * bits / 8 + rows * 4


def on_a_grid(model, group, symmetric):
    """The model with its projections rounded to grids of four bits."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "_proj.weight" in name:
                p.copy_(Grid(4, group, symmetric, True).fit_scales(p.float()).round(p.float()))
    return model


@pytest.mark.parametrize(("kind", "symmetric", "bits"), [("q4_0", True, 4.5), ("q4_1", False, 5), ("q4_1", True, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_four_bits_keep_the_codes_that_a_quantiser_left(tmp_path, kind, symmetric, bits, dtype):
    model = on_a_grid(tiny.model("llama", vocab_size=worlds.VOCABULARY), 32, symmetric).to(dtype)
    worlds.tokenizer(tmp_path)
    folder, target = emitted(tmp_path, model, type=kind)
    stored = read_gguf(folder / "gguf" / "model.gguf")
    for name, path in (("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj")):
        weight = model.get_submodule(f"model.layers.0.{path}").weight.detach()
        known, entry = stored.read_tensor(f"blk.0.{name}.weight"), stored.entries[f"blk.0.{name}.weight"]
        assert entry.bytes * 8 == weight.numel() * bits
        step = codes_if_on_grid(weight, 32).scale.repeat_interleave(32, 1)
        # q4_1 states what code 0 stands for in 11 bits; a bfloat16 model holds code * scale in 8.
        exact = (codes_if_on_grid(weight, 32).code - codes_if_on_grid(weight, 32).zero.repeat_interleave(32, 1)) * step
        assert ((known - exact).abs() <= (step / 200 if kind == "q4_1" else 0)).all()
    assert all(check.holds for check in verify_forms(folder, model, target.forms()))


@pytest.mark.parametrize(
    ("group", "symmetric", "kind", "words", "remedy"),
    [
        (32, False, "q4_0", "0 is not the middle code, and q4_0 has no others", "type: q4_1"),
        (16, True, "q4_0", "no matrix is on a grid of four bits in groups of 32, and `q4_0` rounds none", "group: 32"),
        (64, True, "q4_1", None, None),  # of a larger group every 32 are on a grid, too
    ],
)
def test_grids_that_no_four_bit_type_has_are_refused(tmp_path, group, symmetric, kind, words, remedy):
    model = on_a_grid(tiny.model("llama", intermediate_size=128), group, symmetric)
    if words is None:
        emitted(tmp_path, model, type=kind)
        return
    with pytest.raises(Reject, match=words) as refused:
        emitted(tmp_path, model, type=kind)
    assert remedy in refused.value.diagnostics[0].help


PLAIN = 'config("config.json")'
INPUT_PREFIX = 'hf("./llama")'


@pytest.mark.parametrize(
    ("model", "step", "kind", "slug"),
    [
        (PLAIN, "", "q4_0", "unfit-type"),
        (PLAIN, 'q = quantize.round(on: "*_proj", bits: 8, group: 32)', "q4_1", "unfit-type"),
        (PLAIN, 'q = quantize.round(on: "*_proj", bits: 4, group: 16)', "q4_1", "unfit-type"),
        (PLAIN, 'q = quantize.round(on: "*_proj", bits: 4, group: 32)', "q4_0", "cannot-hold"),
        (INPUT_PREFIX, 'q = quantize.round(on: "*_proj", bits: 4, group: 32)', "q4_0", "cannot-hold"),
        (PLAIN, 'q = quantize.round(on: "*_proj", bits: 4, group: 32)', "q4_1", ""),
        (PLAIN, 'q = quantize.round(on: "*_proj", bits: 3, group: 0)', "q4_0", ""),
        (INPUT_PREFIX, "", "q4_1", "told"),  # whose weights may be on a grid: files of llama.cpp have some
    ],
)
def test_codes_of_four_bits_that_no_step_gives_are_refused_in_plan(tmp_path, model, step, kind, slug):
    tiny.model("llama").save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "config.json").rename(tmp_path / "config.json")
    (tmp_path / "llama" / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
    recipe, told = tmp_path / "r.effspec", []
    recipe.write_text(
        f'effspec 1\nmodel base = {model}\npipeline p(base) {{ {step} }}\nemit p {{ gguf("g", type: {kind}) }}\n'
    )
    granted = Settings(tmp_path / "cache", on_event=lambda event: told.append(getattr(event, "message", "")))
    if slug in ("", "told"):
        api.plan_all_pipelines(api.open_session(recipe, settings=granted))
        assert any("it is refused at the end" in said for said in told) == bool(slug)
        return
    with pytest.raises(Reject) as refused:
        api.plan_all_pipelines(api.open_session(recipe, settings=granted))
    (fault,) = (d for d in refused.value.diagnostics if d.severity == "error")
    assert fault.slug == slug and fault.exit == 3 and fault.span is not None
    assert f'gguf("g", type: {kind})' in fault.span.text


def test_a_model_that_gguf_cannot_hold_ends_as_one_that_onnx_cannot():
    assert EXITS[cannot_write_gguf.exit] == EXITS[cannot_write_onnx.exit] == 5


def test_rows_that_q8_0_does_not_divide_are_refused(tmp_path):
    with pytest.raises(Reject, match="rows of 80, and q8_0 takes multiples of 32"):
        emitted(tmp_path, tiny.model("llama", intermediate_size=80), type="q8_0")


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "f16"), ("llama", "q8_0"), ("llama", "bf16"), ("qwen2", "f32"), ("qwen3", "f32"), ("mistral", "f32")],
)
def test_models_whose_layers_are_alike_keep_their_own_architecture(tmp_path, name, kind):
    model = tiny.model(name, **({"sliding_window": None} if name == "mistral" else {}))
    folder, target = emitted(tmp_path, model, type=kind)
    assert all(check.holds for check in verify_forms(folder, model, target.forms()))
    made = load(folder / "gguf")
    assert made.facts["model_type"] == ("llama" if name == "mistral" else name)


@pytest.mark.slow
def test_every_mode_gives_what_transformers_generates(tmp_path):
    model = tiny.model("llama", vocab_size=worlds.VOCABULARY)
    worlds.tokenizer(tmp_path / "words")
    folder, _ = emitted(tmp_path, model, type="f32")
    assert_generates_alike(model, load(folder / "gguf"))

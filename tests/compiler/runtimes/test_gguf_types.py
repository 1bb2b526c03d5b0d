"""Types of GGUF files that llama.cpp rounds: which matrix has which, how they are read, and what they are rounded for."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from effc.compiler.artifacts.load import load
from effc.compiler.artifacts.verify import verify_forms
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.compiler.ir.capture.capture import capture
from effc.compiler.plugin.registry import Registry
from effc.compiler.plugin.target import LoadRequest
from effc.compiler.runtimes.gguf import llama_quantizer
from effc.compiler.runtimes.gguf.importance import input_importance_by_gguf_name
from effc.compiler.runtimes.gguf.llama_rounding import relative_error
from effc.compiler.runtimes.gguf.number_types import FILE_TYPES, NEED_IMPORTANCE, TYPES, type_of_matrix
from effc.compiler.runtimes.gguf.reading import read_gguf
from effc.compiler.runtimes.gguf.stored_weights import with_weights_of_gguf
from effc.compiler.targets.gguf import Gguf
from effc.dsl.checker.rules import Conflict, Unread
from effc.dsl.checker.values import DataRef
from effc.dsl.syntax.diagnostics import Reject

from tests import tiny, worlds
from tests.compiler.runtimes.test_gguf import write_gguf
from tests.compiler.runtimes.test_gguf_target import emitted
from tests.gguf_bytes import dequantized, random_codes
from tests.recipes_in_memory import context_of, recipe_of

gguf = pytest.importorskip("gguf")
torch.set_num_threads(1)

# Quantises by `gguf` alone, which has some types in blocks of 32, and keeps what it was asked.
CHILD = """
import json, os, sys
import gguf, numpy as np
requests, answers = sys.stdin.buffer, sys.stdout.buffer
while line := requests.readline():
    request = json.loads(line)
    rows, row = request["rows"], request["row"]
    matrix = np.frombuffer(requests.read(4 * rows * row), np.float32).reshape(rows, row)
    weights = np.frombuffer(requests.read(4 * row), np.float32).tolist() if request["weighted"] else None
    with open(sys.argv[1], "a") as log:
        print(json.dumps({**request, "weights": weights}), file=log)
    raw = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType(request["type"])).tobytes()
    answers.write(b"%d\\n" % len(raw) + raw)
    answers.flush()
    if np.abs(matrix).max() > 4e4:
        os.kill(os.getpid(), 9)
    if np.abs(matrix).max() > 1e4:
        sys.exit(3)
"""


@pytest.fixture
def quantizer(tmp_path, monkeypatch):
    """A process that answers as that of llama.cpp does; the file of its requests."""
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(llama_quantizer, "_CHILD", tmp_path / "child.py")
    monkeypatch.setattr(llama_quantizer, "ggml_library_path", lambda: tmp_path / "requests")
    return tmp_path / "requests"


def test_types_have_the_numbers_blocks_and_bytes_of_ggml():
    for name, kind in TYPES.items():
        number = gguf.GGMLQuantizationType[name.upper()]
        assert (number, gguf.GGML_QUANT_SIZES[number]) == (kind.number, (kind.block, kind.bytes))
    assert all(hasattr(gguf.LlamaFileType, name) for name in FILE_TYPES.values())


@pytest.mark.parametrize(
    ("kind", "row", "role", "expected"),
    [
        ("q4_k", 512, "layer", "q4_k"),
        ("q4_k", 512, "table", "q4_k"),
        ("q4_k", 512, "head", "q6_k"),
        ("q6_k", 512, "head", "q6_k"),
        ("iq4_nl", 512, "head", "q6_k"),
        ("iq4_nl", 96, "layer", "iq4_nl"),
        ("iq3_xxs", 512, "head", "q5_k"),
        ("iq1_s", 512, "head", "q5_k"),
        ("iq1_m", 512, "table", "q2_k"),
        ("iq2_xs", 512, "table", "q2_k"),
        ("iq2_s", 512, "table", "iq3_s"),
        ("iq3_s", 512, "table", "iq3_s"),
        ("q2_k", 576, "layer", "q4_0"),
        ("q3_k", 576, "layer", "q4_0"),
        ("q4_k", 576, "layer", "q5_0"),
        ("q5_k", 576, "layer", "q5_1"),
        ("q6_k", 576, "layer", "q8_0"),
        ("iq1_s", 576, "layer", "iq4_nl"),
        ("iq4_xs", 576, "layer", "iq4_nl"),
        ("iq1_s", 576, "head", "q8_0"),
        ("q5_k", 576, "head", "q8_0"),
        ("iq1_s", 576, "table", "q4_0"),
        ("q4_k", 80, "layer", "f16"),
        ("iq4_nl", 80, "layer", "f16"),
        ("q4_k", 80, "head", "f16"),
    ],
)
def test_a_matrix_has_the_type_that_llama_cpp_takes_for_it(kind, row, role, expected):
    assert type_of_matrix(kind, row, role) == expected


def test_the_target_names_every_type_and_refuses_those_that_need_rows_and_have_none():
    (choices,) = (p.choices for p in Registry().vocabulary.word("target", "gguf").params if p.name == "type")
    assert set(choices) == TYPES.keys() - {"q5_0", "q5_1"}  # which are fallbacks alone
    for kind in choices:
        problems, with_rows = ([*Gguf(path="g", type=kind, data=d).problems()] for d in (None, DataRef("rows")))
        assert any(isinstance(p, Conflict) for p in problems) == (kind in NEED_IMPORTANCE)
        assert any(isinstance(p, Unread) for p in with_rows) == (kind not in FILE_TYPES)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "f32"])
def test_tensors_of_every_type_are_read_as_gguf_dequantises_them(tmp_path, kind):
    raw = random_codes(kind, 3, 512)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=gguf.GGMLQuantizationType[kind.upper()])
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    stored = read_gguf(tmp_path / "a.gguf")
    assert stored.entries["x"].bytes == raw.size
    assert np.array_equal(stored.read_tensor("x").numpy(), dequantized(kind, raw).astype(np.float32))


RECIPE = """effspec 1
model base = gguf("m.gguf")
pipeline slim(base) { cut = prune.channels(keep: 50% of channels, align: 32) }
emit slim { gguf("slim", type: q8_0) }
"""


@pytest.mark.slow
def test_a_gguf_in_q4_k_becomes_a_narrower_one_in_another_type(tmp_path):
    worlds.llama(tmp_path / "model", hidden_size=256, intermediate_size=256)
    worlds.tokenizer(tmp_path / "model")
    write_gguf(tmp_path / "m.gguf", tmp_path / "model", "q4_k")
    (tmp_path / "r.effspec").write_text(RECIPE)
    session = api.open_session(tmp_path / "r.effspec", settings=Settings(tmp_path / "cache", threads=1))
    ((artifact,),) = (result.artifacts for result in api.build(session, tmp_path))
    assert artifact.manifest.checks and all(check.holds for check in artifact.manifest.checks)
    source, slim = read_gguf(tmp_path / "m.gguf"), read_gguf(artifact.path / "gguf" / "model.gguf")
    assert slim.entries["blk.0.ffn_up.weight"].shape == (128, 256)
    # Channels that are kept are the source's, dequantised, rounded to q8_0.
    before, after = (stored.read_tensor("blk.0.ffn_up.weight") for stored in (source, slim))
    assert (torch.cdist(after, before).amin(1) / after.norm(dim=1)).max() < 0.01


@pytest.mark.parametrize("tied", [False, True])
def test_importance_is_the_mean_square_of_what_each_column_is_multiplied_with(tied):
    model = tiny.model("llama", tie_word_embeddings=tied)
    rows = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(1))
    importance = input_importance_by_gguf_name(capture(model), rows)
    names = {f"blk.{i}.{part}.weight" for i in range(3) for part in ("attn_q", "attn_output", "ffn_up", "ffn_down")}
    assert names <= importance.keys()
    assert "token_embd.weight" not in importance and ("output.weight" in importance) != tied
    inputs = {}
    for path in ("model.layers.1.mlp.down_proj", "model.layers.2.self_attn.o_proj"):
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, p=path: inputs.update({p: args[0]}))
    with torch.no_grad():
        model(rows)
    for path, name in (
        ("model.layers.1.mlp.down_proj", "ffn_down"),
        ("model.layers.2.self_attn.o_proj", "attn_output"),
    ):
        squares = inputs[path].square().flatten(0, 1).mean(0)
        assert torch.allclose(
            torch.from_numpy(importance[f"blk.{path.split('.')[2]}.{name}.weight"]), squares, rtol=1e-4
        )


def test_columns_that_are_never_used_count_a_little():
    model = tiny.model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:8] = 0
        model.model.layers[1].mlp.up_proj.weight.zero_()
    importance = input_importance_by_gguf_name(capture(model), torch.randint(3, 128, (2, 12)))
    unused = importance["blk.0.ffn_down.weight"][:8]
    assert (unused > 0).all() and unused.max() < importance["blk.0.ffn_down.weight"].mean() * 1e-5
    assert "blk.1.ffn_down.weight" not in importance


def test_errors_are_shares_of_root_mean_squares_that_importance_weights():
    matrix = np.array([[3.0, 4.0]], np.float32)
    assert relative_error(matrix, np.array([[3.0, 0.0]], np.float32), None) == pytest.approx(0.8)
    assert relative_error(matrix, np.array([[3.0, 0.0]], np.float32), np.array([1.0, 0.0])) == 0
    assert relative_error(np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32), None) == 0


def test_a_missing_llama_cpp_is_named_with_its_extra_before_passes_run(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "llama_cpp" else find_spec(name))
    with pytest.raises(Reject) as refused:
        Gguf(path="g", type="q4_k").check_requirements(context_of(tmp_path, tiny.model("llama"), recipe_of([])))
    (fault,) = refused.value.diagnostics
    assert (fault.slug, fault.help) == ("package-missing", 'pip install "effc[llama]"')
    assert "`gguf` with `type: q4_k`" in fault.message


def rounded(tmp_path, model, **options):
    """What `emit` wrote, its target and its notes."""
    worlds.tokenizer(tmp_path)
    folder, target = emitted(tmp_path, model, **options)
    return folder, target, json.loads((folder / "notes.json").read_text())


@pytest.mark.slow
def test_a_rounded_file_computes_what_its_numbers_do_in_transformers(tmp_path, quantizer):
    model = tiny.model("llama", vocab_size=worlds.VOCABULARY)
    folder, target, notes = rounded(tmp_path, model, type="q4_k")
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = torch.randint(3, 200, (2, 12))
    with torch.no_grad(), with_weights_of_gguf(model, folder / "gguf"):
        there = model(ids).logits
        assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert (load(folder / "gguf")(input_ids=ids).logits - there).abs().max() < 1e-4 * there.abs().max()
    checks = verify_forms(folder, model, target.forms())
    assert checks and all(check.holds for check in checks)
    assert any("0 of 23 matrices of the GGUF file are `q4_k`, others 22 `q5_0`, 1 `q8_0`" in note for note in notes)


@pytest.mark.parametrize(
    ("name", "changes", "dtype"),
    [
        ("llama", {}, torch.bfloat16),
        ("stablelm", {"tie_word_embeddings": True}, torch.float32),  # the table is there twice
        ("phi3", {}, torch.float32),
        ("gemma2", {}, torch.float32),
    ],
)
@pytest.mark.slow
def test_rounded_files_of_halves_of_tied_heads_and_of_other_families_hold(tmp_path, quantizer, name, changes, dtype):
    model = tiny.model(name, vocab_size=worlds.VOCABULARY, **changes).to(dtype)
    folder, target, _ = rounded(tmp_path, model, type="q5_k")
    checks = verify_forms(folder, model, target.forms())
    assert checks and all(check.holds for check in checks)


def test_matrices_of_other_numbers_than_the_models_are_refused_when_a_file_is_reopened(tmp_path, quantizer):
    model = tiny.model("llama", vocab_size=worlds.VOCABULARY)
    folder, target, _ = rounded(tmp_path, model, type="q4_k")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.copy_(model.model.layers[1].self_attn.q_proj.weight.flip(0))
    with pytest.raises(Reject, match=r"other numbers as `blk.1.attn_q.weight` than those that it was written of"):
        verify_forms(folder, model, target.forms())


def test_the_quantiser_is_sent_the_importance_of_the_matrix(tmp_path, quantizer):
    model = tiny.model("llama", vocab_size=worlds.VOCABULARY)
    worlds.tokenizer(tmp_path)
    ctx, target = context_of(tmp_path, model, recipe_of([])), Gguf(path="g", type="q4_k", data=DataRef("rows"))
    (tmp_path / "g").mkdir()
    target.emit(capture(model), tmp_path / "g", ctx)
    requests = [json.loads(line) for line in quantizer.read_text().splitlines()]
    importance = input_importance_by_gguf_name(capture(model), ctx.rows(DataRef("rows")))
    sent = [request["weights"] for request in requests]
    assert sum(weights is None for weights in sent) == 1  # of the table of tokens
    for expected in importance.values():
        alike = [w for w in sent if w is not None and len(w) == len(expected) and np.allclose(w, expected, rtol=1e-4)]
        assert alike


@pytest.mark.parametrize(
    ("number", "slug", "sentence"),
    [
        (2e4, "unfit-type", "ended with status 3 over"),
        (5e4, "quantiser-killed", "was killed over .* for want of memory"),
    ],
)
def test_a_quantiser_that_ends_is_said_with_the_matrix(tmp_path, quantizer, number, slug, sentence):
    model = tiny.model("llama", vocab_size=worlds.VOCABULARY)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = number
    with pytest.raises(Reject, match=sentence) as refused:
        rounded(tmp_path, model, type="q4_k")
    assert refused.value.diagnostics[0].slug == slug


@pytest.mark.parametrize("number", [1e6, float("nan")])
def test_numbers_beyond_float16_are_refused_in_rows_that_no_block_fills(tmp_path, quantizer, number):
    model = tiny.model("llama", vocab_size=worlds.VOCABULARY, hidden_size=80, num_attention_heads=4)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = number
    with pytest.raises(Reject, match=r"up_proj|ffn_up") as refused:
        rounded(tmp_path, model, type="q4_k")
    assert "float16 has not" in refused.value.diagnostics[0].message


def test_a_matrix_of_which_nothing_is_left_is_refused(tmp_path, quantizer, monkeypatch):
    dequantize = gguf.quants.dequantize
    monkeypatch.setattr("gguf.quants.dequantize", lambda raw, kind: -dequantize(raw, kind))
    with pytest.raises(Reject, match="so that nothing of it is left"):
        rounded(tmp_path, tiny.model("llama", vocab_size=worlds.VOCABULARY), type="q4_k")


def test_a_rounded_file_opens_with_the_bytes_of_its_types(tmp_path, quantizer):
    model = tiny.model("llama", vocab_size=worlds.VOCABULARY)
    folder, _, _ = rounded(tmp_path, model, type="q5_k")
    entries = read_gguf(folder / "gguf" / "model.gguf").entries
    assert entries["blk.0.ffn_up.weight"].bytes * 8 == 96 * 64 * 6  # q5_1
    assert entries["output.weight"].bytes * 8 == worlds.VOCABULARY * 64 * 8.5  # q8_0
    assert Gguf.open(folder / "gguf", LoadRequest())[0].stored_bytes == sum(e.bytes for e in entries.values())


READS_MODULE = """effspec 1
use std.text
model base = zoo("tiny-llama")
pipeline plain(base) { }
emit plain { gguf("a", type: q4_k, data: text.calib) }
"""


def test_rows_of_a_module_that_a_target_alone_reads_are_part_of_the_recipe(tmp_path):
    (tmp_path / "r.effspec").write_text(READS_MODULE)
    (recipe,) = api.open_session(tmp_path / "r.effspec", settings=Settings(tmp_path / "cache")).recipes()
    assert set(recipe.data) == {"text.calib"}

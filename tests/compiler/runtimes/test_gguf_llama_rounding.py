"""Matrices as llama.cpp's own quantiser rounds them, where `llama-cpp-python` is installed."""

import ctypes
import json

import numpy as np
import pytest
import torch
from effc.compiler.artifacts.verify import verify_forms
from effc.compiler.driver import api
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.gguf.llama_quantizer import ggml_library_path, running_llama_quantizer
from effc.compiler.runtimes.gguf.llama_rounding import relative_error
from effc.compiler.runtimes.gguf.number_types import FILE_TYPES, NEED_IMPORTANCE, TYPES
from effc.compiler.runtimes.gguf.reading import read_gguf
from effc.compiler.targets.gguf import Gguf
from effc.dsl.checker.values import DataRef
from effc.dsl.syntax.diagnostics import Reject

from tests import tiny, worlds
from tests.compiler.runtimes.test_gguf import write_gguf
from tests.recipes_in_memory import context_of, recipe_of

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
torch.set_num_threads(1)

# Of normal weights: no type is further off than the next one that has as many bits or fewer.
FINEST_FIRST = (
    ("q6_k", "q5_k", "q4_k", "q3_k", "q2_k"),
    ("iq4_xs", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_s"),
)


@pytest.fixture(scope="module")
def quantizer():
    with running_llama_quantizer() as started:
        yield started


def normal(rows=8, row=512, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, row)).astype(np.float32)


def spiky(row=512, seed=1):
    """Importance with a few columns that count a hundred times as much as others."""
    return np.where(np.random.default_rng(seed).random(row) < 0.05, 100.0, 1.0).astype(np.float32)


def dequantized(kind, raw):
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind.upper()])


def error(quantizer, kind, matrix, importance, judged):
    return relative_error(matrix, dequantized(kind, quantizer.quantize("x", matrix, kind, importance)), judged)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", FINEST_FIRST)
def test_fewer_bits_are_further_off(quantizer, kinds):
    ones = np.ones(512, np.float32)
    errors = [error(quantizer, kind, normal(), ones, None) for kind in kinds]
    assert errors == sorted(errors)
    assert errors[-1] < 0.7


@pytest.mark.parametrize(("kind", "other"), [("q4_k", "q4_0"), ("iq4_xs", "q4_0"), ("iq4_nl", "q4_0")])
def test_blocks_of_256_lose_less_than_plain_ones_of_as_many_bits(quantizer, kind, other):
    matrix = normal(32)
    plain = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType[other.upper()])
    assert error(quantizer, kind, matrix, None, None) < 0.95 * relative_error(matrix, dequantized(other, plain), None)


@pytest.mark.parametrize("kind", sorted(FILE_TYPES.keys() - {"q6_k"}))
def test_columns_that_count_more_lose_less(quantizer, kind):
    matrix, importance, ones = normal(32), spiky(), np.ones(512, np.float32)
    even, weighted = (error(quantizer, kind, matrix, w, importance) for w in (ones, importance))
    assert weighted < even


def test_rows_are_rounded_alike_alone_and_by_any_number_of_threads(quantizer):
    matrix, importance = normal(3000), spiky()
    whole = quantizer.quantize("x", matrix, "q4_k", importance)
    assert np.array_equal(whole[1500:1502], quantizer.quantize("x", matrix[1500:1502], "q4_k", importance))
    torch.set_num_threads(3)
    with running_llama_quantizer() as other:
        torch.set_num_threads(1)
        assert np.array_equal(whole, other.quantize("x", matrix, "q4_k", importance))


@pytest.mark.parametrize("kind", ["q5_0", "q8_0", "q4_1"])
def test_types_that_gguf_quantises_too_are_as_near(quantizer, kind):
    matrix = normal()
    ours = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType[kind.upper()])
    theirs = quantizer.quantize("x", matrix, kind, None)
    assert ours.shape == theirs.shape
    assert relative_error(matrix, dequantized(kind, theirs), None) < 1.01 * relative_error(
        matrix, dequantized(kind, ours), None
    )


def test_types_that_ggml_does_not_round_without_importance_are_among_those_that_need_it():
    ggml = ctypes.CDLL(str(ggml_library_path()))
    ggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    needing = {name for name, kind in TYPES.items() if ggml.ggml_quantize_requires_imatrix(kind.number)}
    assert needing and needing <= set(NEED_IMPORTANCE)
    ggml.ggml_row_size.argtypes, ggml.ggml_row_size.restype = [ctypes.c_int, ctypes.c_int64], ctypes.c_size_t
    for kind in TYPES.values():
        assert ggml.ggml_row_size(kind.number, 512) == 512 // kind.block * kind.bytes


@pytest.mark.parametrize("kind", ["q4_k", "iq2_xxs"])
def test_numbers_without_codes_are_refused_with_the_matrix(kind):
    matrix = normal()
    matrix[3, 5] = np.nan
    with (
        running_llama_quantizer() as started,
        pytest.raises(Reject, match="x has numbers that are infinite or none") as refused,
    ):
        started.quantize("x", matrix, kind, np.ones(512, np.float32))
    assert refused.value.diagnostics[0].slug == "unfit-type"


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILE_TYPES)
def test_llama_cpp_and_effc_compute_a_rounded_file_alike(tmp_path, kind):
    model = tiny.model(
        "llama", vocab_size=worlds.VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2
    )
    worlds.tokenizer(tmp_path)
    ctx, target = context_of(tmp_path, model, recipe_of([])), Gguf(path="g", type=kind, data=DataRef("rows"))
    (tmp_path / "g").mkdir()
    target.emit(capture(model), tmp_path / "g", ctx)
    checks = verify_forms(tmp_path / "g", model, target.forms())
    assert len(checks) == 8 and all(check.holds for check in checks)
    entries = read_gguf(tmp_path / "g" / "gguf" / "model.gguf").entries
    assert entries["blk.0.ffn_up.weight"].bytes == 512 * 256 * TYPES[kind].bytes_per_number
    assert entries["output.weight"].kind == TYPES["q5_k" if kind in NEED_IMPORTANCE else "q6_k"].number
    (note,) = (n for n in json.loads((tmp_path / "g" / "notes.json").read_text()) if "matrices of the GGUF file" in n)
    assert f"are `{kind}`" in note


RECIPE = """effspec 1
model base = gguf("m.gguf")
data rows = synthetic(8, length: 32, seed: 1)
pipeline slim(base) { cut = prune.channels(keep: 50% of channels, align: 256) }
expect slim { bytes <= 0.6 * base in gguf }
emit slim { gguf("slim", type: iq2_xxs, data: rows) }
"""


@pytest.mark.slow
def test_a_gguf_in_q6_k_becomes_one_of_fewer_channels_and_bits(tmp_path):
    worlds.llama(tmp_path / "model", hidden_size=256, intermediate_size=512)
    worlds.tokenizer(tmp_path / "model")
    write_gguf(tmp_path / "m.gguf", tmp_path / "model", "q6_k")
    (tmp_path / "r.effspec").write_text(RECIPE)
    (result,) = api.compile(tmp_path / "r.effspec", tmp_path / "out", cache_dir=tmp_path / "cache", threads=1)
    (artifact,) = result.artifacts
    assert not result.missed and all(check.holds for check in artifact.manifest.checks)
    assert sum(check.reason.startswith("llama.cpp: ") for check in artifact.manifest.checks) == 2
    entry = read_gguf(artifact.path / "gguf" / "model.gguf").entries["blk.1.ffn_down.weight"]
    assert (entry.kind, entry.shape) == (TYPES["iq2_xxs"].number, (256, 256))
    assert "matrices of the GGUF file are `iq2_xxs`" in (artifact.path / "README.md").read_text()

"""Other hosts of an ONNX folder: onnxruntime-genai by its config, in a process of its own, and readers of data files."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from effc.compiler.runtimes.onnx.checking import load_initializers, read_checked_onnx
from effc.compiler.runtimes.onnx.genai import write_genai_config_and_describe
from effc.compiler.runtimes.onnx.model import open_onnx
from effc.compiler.runtimes.onnx.quantization import quantize_graphs
from effc.compiler.targets.onnx import Onnx
from effc.kernels.grid import Grid

from tests import tiny, worlds
from tests.quantised import quantised
from tests.recipes_in_memory import context_of, recipe_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
torch.set_num_threads(1)
needs_genai = pytest.mark.skipif(not find_spec("onnxruntime_genai"), reason="onnxruntime-genai is not installed")


def small_llama():
    return tiny.model(
        "llama", vocab_size=worlds.VOCABULARY, max_position_embeddings=256, eos_token_id=1, intermediate_size=128
    )


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """Folder of a model with a tokenizer, whose layers are codes of four bits, as the target writes it."""
    folder, model = tmp_path_factory.mktemp("codes"), small_llama()
    program = quantised(model, {"_proj": Grid(4, 32, False, True)})
    (folder / "o").mkdir()
    Onnx(path="o", weights="nbits").emit(program, folder / "o", context_of(folder, model, recipe_of([])))
    worlds.tokenizer(folder / "o" / "onnx")
    return folder / "o"


@pytest.fixture(scope="module")
def rounded(codes, tmp_path_factory):
    """The same folder with inputs and other matrices in int8."""
    folder = tmp_path_factory.mktemp("rounded") / "onnx"
    shutil.copytree(codes / "onnx", folder)
    quantize_graphs(folder)
    return folder


GENERATE = """
import json, sys
import onnxruntime_genai as genai
model = genai.Model(sys.argv[1])
tokenizer = genai.Tokenizer(model)
tokens = list(map(int, tokenizer.encode(sys.argv[2])))
params = genai.GeneratorParams(model)
params.set_search_options(do_sample=False, max_length=len(tokens) + 24)
generator = genai.Generator(model, params)
generator.append_tokens(tokens)
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps({"prompt": tokens, "tokens": list(map(int, generator.get_sequence(0)))}))
"""


@needs_genai
@pytest.mark.parametrize("kind", ["codes", "rounded"])
@pytest.mark.slow
def test_onnxruntime_genai_generates_the_greedy_tokens_that_effc_generates(codes, rounded, kind):
    folder = {"codes": codes / "onnx", "rounded": rounded}[kind]
    run = subprocess.run(
        [sys.executable, "-c", GENERATE, str(folder), "In the beginning"], capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr[-2000:]
    answer = json.loads(run.stdout.splitlines()[-1])
    ids = torch.tensor([answer["prompt"]])
    expected = open_onnx(folder).generate(ids, max_new_tokens=24, do_sample=False)[0].tolist()
    assert answer["tokens"] == expected and len(expected) > len(answer["prompt"])


def test_codes_stay_where_int8_rounds_what_they_multiply_and_the_other_matrices(codes, rounded):
    levels = {}
    for folder in (codes / "onnx", rounded):
        nodes = [n for n in read_checked_onnx(folder).model.graph.node if n.op_type == "MatMulNBits"]
        levels[folder] = [a.i for n in nodes for a in n.attribute if a.name == "accuracy_level"]
    assert levels == {codes / "onnx": [0] * 21, rounded: [4] * 21}
    assert read_checked_onnx(rounded).operators["MatMulInteger"] == 1  # the head


def test_every_weight_lies_beside_the_graph_so_that_a_file_may_be_larger_than_protobufs_two_gigabytes(codes, rounded):
    for folder in (codes / "onnx", rounded):
        stored = read_checked_onnx(folder)
        inside = [t for t in stored.model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert max((t.ByteSize() for t in inside), default=0) < 1200
        tensors = load_initializers(folder, stored).values()
        assert len(stored.data) >= sum(t.nbytes for t in tensors if t.nbytes > 1200) > 0


def test_the_config_states_the_tokens_that_end_a_text_and_how_the_model_draws_tokens(codes, tmp_path):
    shutil.copytree(codes / "onnx", tmp_path / "onnx")
    model = small_llama()
    model.config.pad_token_id = None
    model.generation_config.update(do_sample=True, top_p=0.5, eos_token_id=[2, 5], pad_token_id=None)
    note = write_genai_config_and_describe(model, tmp_path / "onnx")
    body = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    assert body["model"]["eos_token_id"] == [2, 5] and body["model"]["pad_token_id"] == 2
    assert body["search"]["do_sample"] is True and body["search"]["top_p"] == 0.5
    assert body["search"]["max_length"] == body["model"]["context_length"] == 256
    assert body["model"]["decoder"]["inputs"]["position_ids"] == "position_ids"
    assert 'onnxruntime_genai.Model("onnx")' in note
    assert note in json.loads((codes / "notes.json").read_text())

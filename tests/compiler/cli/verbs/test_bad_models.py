"""Models and texts that a compile can't do with: each ends with its code, its place and a remedy."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.compiler.cli.verbs.conftest import SMALL as RECIPE

CLASS_PATHS = {
    "model": '  --> r.effspec:2:14\n   2 | model base = hf("./model")\n     |              ^^^^^^^^^^^^^\n',
    "data": '  --> r.effspec:3:14\n   3 | data  rows = text("rows.txt", samples: 4, length: 32)\n'
    "     |              ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^\n",
    "step": "  --> r.effspec:5:10\n   5 |   slim = prune.channels(",
}


def weights(folder: Path) -> Path:
    return folder / "model" / "model.safetensors"


def reconfigured(folder: Path, **changes) -> None:
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def revalued(folder: Path, name: str, value: float) -> None:
    tensors = load_file(weights(folder))
    tensors[name].view(-1)[7] = value
    save_file(tensors, weights(folder), metadata={"format": "pt"})


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pickled(folder: Path) -> None:
    torch.save(load_file(weights(folder)), folder / "model" / "pytorch_model.bin")
    weights(folder).unlink()


def sharded(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    weights(folder).unlink()


def guzzled(folder: Path) -> None:
    """The model as the first half of a GGUF file."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(2)
    for name, tensor in load_file(weights(folder)).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    halved(folder / "model.gguf")
    (folder / "r.effspec").write_text(RECIPE.replace('hf("./model")', 'gguf("model.gguf")'))


UP = "model.layers.0.mlp.up_proj.weight"
CUSTOM = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
BAD = {
    "no weights": (
        lambda f: weights(f).unlink(),
        5,
        "model",
        "no-model",
        "there is no model.safetensors in model",
        "fetch the weights",
    ),
    "no config": (
        lambda f: (f / "model" / "config.json").unlink(),
        5,
        "model",
        "no-model",
        "there is no config.json in model",
        "take a folder that `save_pretrained` wrote",
    ),
    "half a config": (
        lambda f: halved(f / "model" / "config.json"),
        5,
        "model",
        "bad-config",
        "model/config.json is not JSON: it breaks at line ",
        "fetch the file again",
    ),
    "cut weights": (
        lambda f: halved(weights(f)),
        5,
        "model",
        "damaged-weights",
        "model.safetensors is cut: its tensors need 95488 bytes, ",
        "fetch the file again",
    ),
    "weights of nothing": (
        lambda f: weights(f).write_bytes(b""),
        5,
        "model",
        "damaged-weights",
        "model.safetensors is cut: 0 bytes",
        "fetch the file again",
    ),
    "a shard missing": (sharded, 5, "model", "missing-shard", "1 of 1 shards are not there", "fetch them into"),
    "weights of another width": (
        lambda f: reconfigured(f, intermediate_size=64),
        5,
        "model",
        "other-weights",
        "is 32 x 48 in the weights and 32 x 64 by the config, and 5 more",
        "take config.json from the same revision",
    ),
    "weights of fewer layers": (
        lambda f: reconfigured(f, num_hidden_layers=3),
        5,
        "model",
        "other-weights",
        "the weights have no `model.layers.2.input_layernorm.weight`, and 8 more",
        "take the config they were saved with",
    ),
    "a pickle": (
        pickled,
        5,
        "model",
        "pickle-weights",
        "the weights are only there as pytorch_model.bin",
        "take a revision with model.safetensors",
    ),
    "code of its own": (
        lambda f: reconfigured(f, **CUSTOM),
        5,
        "model",
        "remote-code",
        "`mine` runs code that came with the model",
        "add --trust-remote-code",
    ),
    "a type unheard of": (
        lambda f: reconfigured(f, model_type="llamma"),
        5,
        "model",
        "unknown-architecture",
        "does not know the model type `llamma`",
        "nearest is `llama`",
    ),
    "NaN in the weights": (
        lambda f: revalued(f, UP, float("nan")),
        5,
        "model",
        "not-finite",
        f"`{UP}` holds 1 value NaN or infinite",
        "take another revision",
    ),
    "infinity in the weights": (
        lambda f: revalued(f, UP, float("-inf")),
        5,
        "model",
        "not-finite",
        f"`{UP}` holds 1 value NaN or infinite",
        "take another revision",
    ),
    "scores that are NaN": (
        lambda f: revalued(f, "model.norm.weight", 3e38),
        1,
        "step",
        "no-finite-score",
        "of NaN or infinity",
        "score on other data",
    ),
    "half a tokenizer": (
        lambda f: halved(f / "model" / "tokenizer.json"),
        5,
        "model",
        "bad-tokenizer",
        "tokenizer.json describes no tokenizer that is taken",
        "fetch it again",
    ),
    "a short text": (
        lambda f: (f / "rows.txt").write_text("And it"),
        3,
        "data",
        "too-short",
        "6 tokens make 0 of 4 rows of 32 tokens",
        "give 124 tokens of text\n",
    ),
    "a text for one row": (
        lambda f: (f / "rows.txt").write_text("And it came to pass. " * 3),
        3,
        "data",
        "too-short",
        "63 tokens make 2 of 4 rows",
        "`samples: 2`",
    ),
    "an empty text": (
        lambda f: (f / "rows.txt").write_text(""),
        3,
        "data",
        "too-short",
        "0 tokens make 0 of 4",
        "give 124 tokens of text",
    ),
    "no text": (
        lambda f: (f / "rows.txt").rename(f / "row.txt"),
        3,
        "data",
        "no-file",
        "there is no file rows.txt",
        "did you mean `row.txt`?",
    ),
    "a text in Latin-1": (
        lambda f: (f / "rows.txt").write_bytes("café ".encode("latin1") * 99),
        3,
        "data",
        "not-utf8",
        "rows.txt is not UTF-8 at byte 3 (0xe9)",
        "iconv -f latin1 -t utf-8 rows.txt",
    ),
    "bytes that are no text": (
        lambda f: (f / "rows.txt").write_bytes(b"\xe9\0" * 99),
        3,
        "data",
        "not-utf8",
        "rows.txt is not UTF-8 at byte 0 (0xe9)",
        "it holds zero bytes, so it is no text",
    ),
    "a text in UTF-16": (
        lambda f: (f / "rows.txt").write_bytes(("And it " * 99).encode("utf-16")),
        3,
        "data",
        "not-utf8",
        "rows.txt is not UTF-8 at byte 0 (0xff)",
        "iconv -f utf-16",
    ),
}


CUDA_ONLY = """import effc_test_cuda_scan
from transformers import PretrainedConfig, PreTrainedModel
class Config(PretrainedConfig):
    model_type = "mine"
class Model(PreTrainedModel):
    config_class = Config
"""


def test_code_that_needs_a_package_which_is_not_here_is_the_environments(effc, here):
    reconfigured(here, **CUSTOM)
    (here / "model" / "mine.py").write_text(CUDA_ONLY)
    run = effc("compile", "r.effspec", "--no-progress", "--trust-remote-code")
    assert (run.code, run.out) == (5, "") and run.err.startswith("error[model-code]: "), run.err
    assert "effc_test_cuda_scan" in run.err and "on CUDA alone" in run.err and CLASS_PATHS["model"] in run.err
    (here / "model" / "mine.py").write_text(CUDA_ONLY.replace("import effc_test_cuda_scan", "1 / 0"))
    run = effc("compile", "r.effspec", "--no-progress", "--trust-remote-code")
    assert run.code == 5 and "raises ZeroDivisionError" in run.err and "--debug" in run.err


def test_weights_of_fewer_layers_are_refused_before_they_are_read(effc, here):
    reconfigured(here, num_hidden_layers=3)
    run = effc("plan", "r.effspec")
    assert (run.code, run.out) == (5, "") and run.err.startswith("error[other-weights]: "), run.err
    assert "the weights have no `model.layers.2.input_layernorm.weight`, and 8 more" in run.err.splitlines()[0]
    assert CLASS_PATHS["model"] in run.err and "take the config they were saved with" in run.err


@pytest.mark.slow
def test_weights_that_need_no_tensor_of_their_own_are_planned(effc, here):
    """Two tables are one, and the file holds it once."""
    assert "lm_head.weight" not in load_file(weights(here))
    assert effc("plan", "r.effspec").code == 0
    reconfigured(here, tie_word_embeddings=False)
    run = effc("plan", "r.effspec")
    assert run.code == 5 and "the weights have no `lm_head.weight`" in run.err


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_model_or_a_text_is_told_at_its_place(effc, here, name):
    damage, code, place, slug, fact, remedy = BAD[name]
    damage(here)
    run = effc("compile", "r.effspec", "--no-progress")
    assert (run.code, run.out) == (code, ""), run.err
    assert run.err.startswith(f"error[{slug}]: ") and fact in run.err.splitlines()[0]
    assert CLASS_PATHS[place] in run.err
    assert remedy in run.err.partition("\nhelp: ")[2]
    assert "Traceback" not in run.err and not (here / "out").exists()


def test_half_a_gguf_file_is_refused(effc, here):
    guzzled(here)
    run = effc("compile", "r.effspec", "--no-progress")
    assert (run.code, run.out) == (5, "") and run.err.startswith("error[bad-gguf]: ")
    assert "model.gguf of " in run.err and " is cut or not GGUF" in run.err and "fetch the file again" in run.err
    assert "  --> r.effspec:2:14" in run.err and "Traceback" not in run.err


def test_a_result_that_computes_no_numbers_is_not_emitted(effc, here):
    revalued(here, "model.norm.weight", 3e38)
    (here / "r.effspec").write_text(RECIPE.replace(", score: perplexity(rows)", ""))
    run = effc("compile", "r.effspec", "--no-progress")
    assert run.code == 1
    error = "error[not-a-number]: the result computes NaN or infinity for ordinary tokens\n  --> r.effspec:7:14\n"
    assert run.err.startswith(
        f"warning[unused-name]: data `rows` is never used; drop the line, or use the name\n{error}"
    )
    assert "Traceback" not in run.err and not (here / "out" / "small").exists()


@pytest.mark.slow
def test_an_artifact_edited_by_hand_does_not_run(effc, here):
    assert effc("compile", "r.effspec", "-q").code == 0
    path = here / "out" / "small" / "compact" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    for verb in (("run", "out/small", "-p", "And"), ("test", "out/small")):
        (here / "r.effspec").write_text(RECIPE + "expect small { params <= 0.99 * base }\n")
        run = effc(*verb, "--no-progress") if verb[0] == "run" else effc(*verb, "--recipe", "r.effspec")
        assert run.code == 5 and run.err.splitlines()[0].endswith(
            "out/small/compact/model.safetensors has other content than when it was written"
        ), run.err
        assert "error[artifact-edited]" in run.err and "compile again" in run.err

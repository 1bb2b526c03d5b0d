"""Models, texts and machines that a compile can't do with: each ends with its code, its place and a remedy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import worlds

SCRIPT = "import sys; from effc.compiler.cli import main; sys.exit(main())"
RECIPE = """effspec 1
model base = hf("./model")
data  rows = text("rows.txt", samples: 4, length: 32)
pipeline small(base) {
  slim = prune.channels(keep: 50% of channels, align: 8, score: perplexity(rows))
}
emit small { hf("small", form: compact) }
"""
PLACES = {
    "model": '  --> r.effspec:2:14\n   2 | model base = hf("./model")\n     |              ^^^^^^^^^^^^^\n',
    "data": '  --> r.effspec:3:14\n   3 | data  rows = text("rows.txt", samples: 4, length: 32)\n'
    "     |              ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^\n",
    "step": "  --> r.effspec:5:10\n   5 |   slim = prune.channels(",
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with a small model, a text and a recipe of which there is nothing to say."""
    folder = tmp_path_factory.mktemp("sound")
    (folder / "model").mkdir()
    worlds.llama(folder / "model")
    worlds.tokenizer(folder / "model")
    (folder / "rows.txt").write_text("And it came to pass. " * 40)
    (folder / "r.effspec").write_text(RECIPE)
    return folder


@pytest.fixture
def here(sound, tmp_path):
    """A copy to damage."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    return tmp_path


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
        "the tokenizer files in model can't be read",
        "fetch them again",
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
    assert "effc_test_cuda_scan" in run.err and "on CUDA alone" in run.err and PLACES["model"] in run.err
    (here / "model" / "mine.py").write_text(CUDA_ONLY.replace("import effc_test_cuda_scan", "1 / 0"))
    run = effc("compile", "r.effspec", "--no-progress", "--trust-remote-code")
    assert run.code == 5 and "raises ZeroDivisionError" in run.err and "--debug" in run.err


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_model_or_a_text_is_told_at_its_place(effc, here, name):
    damage, code, place, slug, fact, remedy = BAD[name]
    damage(here)
    run = effc("compile", "r.effspec", "--no-progress")
    assert (run.code, run.out) == (code, ""), run.err
    assert run.err.startswith(f"error[{slug}]: ") and fact in run.err.splitlines()[0]
    assert PLACES[place] in run.err
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
    assert run.err.startswith(
        "error[not-a-number]: the result computes NaN or infinity for ordinary tokens\n  --> r.effspec:7:14\n"
    )
    assert "Traceback" not in run.err and not (here / "out" / "small").exists()


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


# -- machines ------------------------------------------------------------------------------------------------

WITHOUT = """
import importlib.metadata as metadata, os
from importlib.machinery import PathFinder
gone, found, version = os.environ["WITHOUT"], PathFinder.find_spec, metadata.version

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] == gone else found(name, path, target)

def asked(name):
    if name == gone:
        raise metadata.PackageNotFoundError(name)
    return version(name)

PathFinder.find_spec, metadata.version = find_spec, asked
"""


@pytest.fixture
def without(process, here, tmp_path_factory):
    """Run in a process that has one package less."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(WITHOUT)
    return lambda package, *args: process(*args, cwd=here, WITHOUT=package, PYTHONPATH=str(site))


def test_an_optional_package_that_is_missing_is_named_with_its_group(without, here):
    (here / "r.effspec").write_text(RECIPE.replace('hf("./model")', 'gguf("model.gguf")'))
    run = without("gguf", "plan", "r.effspec")
    assert (run.code, run.out) == (5, "")
    assert run.err.startswith("error[package-missing]: model source gguf needs gguf, not installed here\n")
    assert "  --> r.effspec:2:14" in run.err and 'help: pip install "effc[gguf]"' in run.err


def test_a_required_package_that_is_missing_is_named_before_work(without):
    run = without("filelock", "compile", "r.effspec")
    assert (run.code, run.out) == (5, "")
    assert run.err.startswith("error[package-missing]: filelock is not installed, effc needs filelock>=")
    assert 'help: pip install "filelock' in run.err


def in_small_disk(here: Path, size: str, *args: str) -> subprocess.CompletedProcess:
    """Run with a disk of that size on `small/`; skips where a user may not mount one."""
    (here / "small").mkdir()
    mount = "mount -t tmpfs -o size={} tmpfs small"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount.format("1m")], cwd=here, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    command = f'{mount.format(size)} && "$0" -c "$1" {" ".join(args)}; code=$?; find small -type f; exit $code'
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, sys.executable, SCRIPT],
        cwd=here,
        capture_output=True,
        text=True,
        env={**os.environ},
    )


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare here")
@pytest.mark.parametrize(("where", "slug"), [("--cache-dir", "no-space"), ("-o", "disk-full")])
def test_a_disk_that_fills_up_is_exit_6_and_holds_nothing_half_written(here, where, slug):
    run = in_small_disk(here, "48k", "compile", "r.effspec", "--no-progress", where, "small/x")
    assert run.returncode == 6, run.stderr
    assert f"error[{slug}]: " in run.stderr and "Traceback" not in run.stderr
    left = run.stdout.splitlines()
    assert not any(name.endswith("manifest.json") or "/steps/" in name for name in left), left


def test_a_memory_bound_that_is_passed_is_exit_6_and_leaves_no_artifact(effc, here):
    run = effc("compile", "r.effspec", "--no-progress", "--max-memory", "10MiB", "--cache-dir", "cache")
    assert (run.code, run.out) == (6, "")
    assert run.err.startswith("error[memory-bound]: ") and " are held, 10.0 MiB are allowed\n" in run.err
    assert "--> r.effspec:" in run.err and "raise --max-memory" in run.err
    assert not (here / "out").exists() and not any((here / "cache").rglob("steps/*"))

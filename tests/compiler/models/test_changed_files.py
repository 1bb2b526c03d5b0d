"""Files of a model that somebody writes while it is compiled: nothing of what was computed meanwhile is kept."""

import os
import signal

import pytest
import torch
from effc.compiler.artifacts.artifact import artifact_hash
from effc.compiler.core.events import Recorded, Said, StageBegan
from effc.compiler.driver import api
from effc.dsl.syntax.diagnostics import Reject

from tests import worlds

RECIPE = """effspec 1
model base = hf("./model")
data  rows = synthetic(4, length: 12, seed: 1)

pipeline lean(base) {
  slim = prune.blocks(remove: 2, score: SCORE(rows))
}

emit lean { hf("lean") }
"""


@pytest.fixture
def model(tmp_path):
    """A shard of a tiny Llama with a tokenizer."""
    from transformers import AutoModelForCausalLM

    folder = worlds.llama(tmp_path / "model")
    worlds.tokenizer(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)


def write(file, data):
    """Put other bytes into a file as a copy onto it would, without making it shorter."""
    with open(file, "r+b") as opened:
        opened.write(data)


def changed(data):
    """Bytes of weights of other numbers: the last exponent of each of the last ones."""
    tail = bytearray(data[-4000:])
    tail[3::4] = bytes([0x3F]) * len(tail[3::4])
    return data[:-4000] + bytes(tail)


def compiled(folder, act=lambda: None, when=lambda event: False, score="perplexity", cache="cache"):
    """The hash of the artifact, and what was said; `act` is done once, at the first event that `when` holds for."""
    recipe, said, acts = folder / "tiny.effspec", [], [act]
    recipe.write_text(RECIPE.replace("SCORE", score))

    def tell(event):
        said.append(event)
        if acts and when(event):
            acts.pop()()

    out = folder / f"out-{cache}"
    (result,) = api.compile(recipe, out, force=True, cache_dir=folder / cache, threads=1, on_event=tell)
    return artifact_hash(result.artifacts[0].path), [e.message for e in said if isinstance(e, Said)]


def at_first_cut(event):
    return isinstance(event, Recorded) and event.name.startswith("cut 1")


def at_emission(event):
    return isinstance(event, StageBegan) and event.stage.startswith("emit")


@pytest.mark.parametrize("score", ["perplexity", pytest.param("divergence", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_weights_that_are_written_during_a_step_end_the_compile_and_leave_nothing(model, tmp_path, score):
    good = model.read_bytes()
    whole, _ = compiled(tmp_path, score=score, cache="clean")
    with pytest.raises(Reject) as refused:
        compiled(tmp_path, lambda: write(model, changed(good)), at_first_cut, score)
    (diagnostic,) = refused.value.diagnostics
    assert (diagnostic.slug, diagnostic.exit) == ("model-changed", 5)
    assert diagnostic.message == f"{model} changed while it was compiled" and diagnostic.span.line == 2
    assert not list((tmp_path / "out-cache").glob("*")) and not list((tmp_path / "cache" / "steps").glob("*"))
    assert not list((tmp_path / "cache" / "work").glob("*"))
    write(model, good)
    assert compiled(tmp_path, score=score)[0] == whole


@pytest.mark.slow
def test_weights_that_are_written_with_their_time_kept_are_found_too(model, tmp_path):
    good, fact = model.read_bytes(), model.stat()

    def act():
        write(model, changed(good))
        os.utime(model, ns=(fact.st_atime_ns, fact.st_mtime_ns))

    with pytest.raises(Reject, match="model-changed"):
        compiled(tmp_path, act, at_first_cut)


@pytest.mark.slow
def test_weights_that_are_written_before_the_artifact_is_in_place_leave_none(model, tmp_path):
    good = model.read_bytes()
    whole, _ = compiled(tmp_path, cache="clean")
    with pytest.raises(Reject, match="model-changed"):
        compiled(tmp_path, lambda: write(model, changed(good)), at_emission)
    assert not list((tmp_path / "out-cache").glob("*"))
    assert len(list((tmp_path / "cache" / "steps").glob("*"))) == 1  # it was whole before
    write(model, good)
    assert compiled(tmp_path)[0] == whole


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_that_is_exchanged_ends_the_compile(tmp_path, name):
    file = worlds.llama(tmp_path / "model") / name
    worlds.tokenizer(tmp_path / "model")

    def act():
        other = file.with_name("other")
        other.write_bytes(changed(file.read_bytes()) if file.suffix == ".safetensors" else file.read_bytes() + b"\n")
        other.replace(file)

    with pytest.raises(Reject, match="model-changed"):
        compiled(tmp_path, act, at_first_cut)


def test_an_interrupted_step_leaves_nothing_where_weights_were_written(model, tmp_path):
    def act():
        write(model, changed(model.read_bytes()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled(tmp_path, act, at_first_cut)
    assert not list((tmp_path / "cache" / "work").glob("*"))


def test_weights_that_are_removed_are_named(tmp_path):
    file = worlds.llama(tmp_path / "model") / "model.safetensors"
    with pytest.raises(Reject) as refused:
        compiled(tmp_path, file.unlink, at_first_cut)
    assert refused.value.diagnostics[0].message == f"{file} was removed while it was compiled"


@pytest.mark.slow
def test_weights_that_are_touched_or_copied_onto_themselves_are_compiled(model, tmp_path):
    whole, _ = compiled(tmp_path, cache="clean")
    assert compiled(tmp_path, lambda: write(model, model.read_bytes()), at_first_cut)[0] == whole


@pytest.mark.slow
def test_a_run_that_is_killed_after_weights_were_written_leaves_no_scores_that_are_used(model, tmp_path):
    torch.set_num_threads(1)
    good = model.read_bytes()
    whole, _ = compiled(tmp_path, cache="clean")

    def act():
        write(model, changed(good))
        os.kill(os.getpid(), signal.SIGKILL)

    process = os.fork()
    if process == 0:
        compiled(tmp_path, act, at_first_cut)
        os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
    assert list((tmp_path / "cache" / "work").glob("*/scores.jsonl"))
    write(model, good)
    again, said = compiled(tmp_path)
    assert again == whole
    assert [text for text in said if "an earlier run" in text] == [
        f"what an earlier run left of this step is not used: {model} was written meanwhile"
    ]


@pytest.mark.slow
def test_what_a_killed_run_left_is_used_where_the_model_was_moved(model, tmp_path):
    torch.set_num_threads(1)
    process = os.fork()
    if process == 0:
        compiled(tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL), at_first_cut)
        os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
    other = model.with_name("other")
    other.write_bytes(model.read_bytes())
    other.replace(model)
    assert not [text for text in compiled(tmp_path)[1] if "an earlier run" in text]

"""The speed of a GGUF file is llama.cpp's, in a process of its own, or it is not timed."""

import sys

import pytest
import torch
from effc.compiler.artifacts.load import load_to_judge
from effc.compiler.driver import api
from effc.compiler.evaluation.timing import make_decode_step, make_prefill_step, prompt_too_long
from effc.compiler.plugin.clock import not_timed
from effc.compiler.runtimes.gguf import llama_clock
from effc.dsl.syntax.diagnostics import Reject

from tests import tiny
from tests.compiler.runtimes.test_gguf_target import emitted

pytest.importorskip("gguf")

CHILD = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    print(0.25 if "token" in request else 0.5 + len(request["prompt"]), flush=True)
    if request.get("token") == 7:
        sys.exit(3)
"""
RECIPE = """effspec 1
model base = zoo("tiny-llama")
pipeline plain(base) { }
expect plain { decode.p50(prompt: 8, steps: 2) <= 5 * base in gguf }
emit plain { gguf("g") }
"""


@pytest.fixture
def model(tmp_path):
    folder, _ = emitted(tmp_path, tiny.model("llama"))
    return load_to_judge(folder / "gguf", "cpu")


@pytest.fixture
def child(tmp_path, monkeypatch):
    """A process that answers as the one of llama.cpp does."""
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(llama_clock, "_CHILD", tmp_path / "child.py")
    monkeypatch.setattr(llama_clock, "find_spec", lambda name: sys)


def test_times_are_those_that_the_process_of_llama_cpp_took(model, child):
    step = make_decode_step(model, 12)
    assert step() == 0.25 and step() == 0.25
    assert make_prefill_step(model, 12)() == 12.5


def test_a_process_ends_with_whoever_asked_it(model, child):
    step = make_decode_step(model, 12)
    process = step.__closure__[0].cell_contents.__self__.process
    assert process.poll() is None
    del step
    assert process.poll() is not None


def test_what_llama_cpp_can_not_time_is_refused_with_the_reason(model, child, monkeypatch):
    with pytest.raises(Reject) as refused:
        make_decode_step(model, 12, batch=2)
    assert refused.value.diagnostics[0].fault is not_timed
    with pytest.raises(Reject) as refused:
        make_decode_step(model, 5000)
    assert refused.value.diagnostics[0].fault is prompt_too_long
    with pytest.raises(Reject, match="ended with status 3"):
        step = model.runtime.decode_step([7, 7], 1)
        step(), step()
    monkeypatch.setattr(llama_clock, "find_spec", lambda name: None)
    with pytest.raises(Reject, match="not installed here"):
        make_decode_step(model, 12)


@pytest.mark.slow
def test_a_bound_on_a_time_that_was_not_taken_is_undecided_and_its_row_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_clock, "find_spec", lambda name: None)
    (tmp_path / "r.effspec").write_text(RECIPE)
    (result,) = api.compile(tmp_path / "r.effspec", tmp_path / "out", cache_dir=tmp_path / "cache")
    (artifact,) = result.artifacts
    (missed,) = result.missed
    assert missed.slug == "bound-undecided" and "llama-cpp-python" in missed.note
    assert {m.metric for m in artifact.manifest.measures if m.untimed} == {"decode.p50(prompt: 8, steps: 2)"}
    assert [e.outcome for e in artifact.manifest.expectations] == ["undecided"]
    assert "llama-cpp-python" in (artifact.path / "README.md").read_text()


def test_llama_cpp_times_a_file(model):
    pytest.importorskip("llama_cpp")
    torch.set_num_threads(1)
    decode, prefill = make_decode_step(model, 40), make_prefill_step(model, 40)
    assert all(0 < decode() < 5 for _ in range(60))  # beyond the context that was asked for
    assert 0 < prefill() < 5

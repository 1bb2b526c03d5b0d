"""A program that continues text, opened by torch alone; what is refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import effc
import pytest
import torch
from effc.compiler.artifacts.exported import check_exported_folder, load_exported_model
from effc.compiler.artifacts.exported_steps import StepFacts, Stepper
from effc.compiler.artifacts.verify import verify_forms
from effc.compiler.artifacts.verify_child import generate_greedy
from effc.compiler.ir.capture.capture import capture
from effc.compiler.targets.pt2 import Pt2
from effc.dsl.syntax.diagnostics import Reject

from tests import mixers, tiny
from tests.compiler.runtimes.modes import assert_generates_alike
from tests.recipes_in_memory import context_of, recipe_of

pytestmark = pytest.mark.slow

RECIPE = """effspec 1
model base = zoo("tiny-llama")
pipeline thin(base) { slim = prune.channels(keep: 50% of channels) }
emit thin { pt2("thin", context: 64) }
"""
PAGE = Path(__file__).parents[3] / "docs" / "targets.md"
# A prompt, and a loop over the program with no more than torch: transformers and effc can't be imported.
LOOP = """
import json, sys
sys.modules["transformers"] = sys.modules["effc"] = None
import torch
folder = sys.argv[1]
facts = json.load(open(folder + "/step.json"))
step, n = torch.export.load(folder + "/step.pt2").module(), facts["context"]
ids, before, tokens = torch.tensor([[5, 9, 17, 4]]), 0, []
past = [torch.zeros(1, heads, n, d) for heads, d in facts["past"]]
with torch.no_grad():
    for _ in range(32):
        given = {"input_ids": ids, "attention_mask": torch.ones(1, n, dtype=torch.int64),
                 "position_ids": torch.arange(before, before + ids.shape[1])[None]}
        given = {name: given[name] for name in facts["inputs"]}
        logits, past = step(given=given, before=torch.tensor(before), past=past)
        before += ids.shape[1]
        ids = logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
print(json.dumps(tokens))
"""


def emitted(tmp_path, model, **options):
    target, folder = Pt2(path="exported", **options), tmp_path / "exported"
    folder.mkdir()
    target.emit(capture(model), folder, context_of(tmp_path, model, recipe_of([])))
    return folder, target


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return emitted(tmp_path_factory.mktemp("steps"), tiny.model("llama"), context=64)


def greedy(model, steps=32):
    ids = torch.tensor([[5, 9, 17, 4]])
    return generate_greedy(model, ids, torch.ones_like(ids), steps).sequences[0, 4:].tolist()


def test_torch_alone_takes_the_same_tokens_from_a_program_that_continues_text(llama):
    folder, _ = llama
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOOP, str(folder / "program")], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == greedy(tiny.model("llama"))
    assert "before=torch.tensor(n), past=past)" in (folder / "notes.json").read_text()


def test_effc_opens_both_programs_as_one_model_that_generates_batches_of_any_padding(llama):
    model, opened = tiny.model("llama"), load_exported_model(llama[0] / "program")
    ids = torch.randint(3, 128, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :7] = 0
    wanted, found = (generate_greedy(m, ids, mask, 20) for m in (model, opened))
    assert torch.equal(wanted.sequences, found.sequences)
    long = torch.randint(3, 128, (1, 100), generator=torch.Generator().manual_seed(1))  # more than the cache holds
    assert torch.allclose(opened(input_ids=long).logits, model(input_ids=long).logits, atol=1e-4)
    with pytest.raises(Reject, match="longer than the model's context of 64"):
        opened.generate(long, max_new_tokens=1)


class StrideRecorder(torch.nn.Module):
    """Program of one logit that records how its inputs lie in memory."""

    def __init__(self):
        super().__init__()
        self.strides = []

    def forward(self, given, before, past):
        self.strides.append([x.stride() for x in given.values()])
        return torch.zeros(len(given["input_ids"]), 1, 1), past


def test_inputs_of_a_step_lie_alike_at_every_length_so_that_shapes_are_checked_once():
    recorder = StrideRecorder()
    stepper = Stepper(
        recorder, StepFacts(64, ("input_ids", "attention_mask", "position_ids"), ((2, 4),) * 2, torch.float32)
    )
    for length in range(2, 9):
        stepper.step(torch.ones(1, length, dtype=torch.int64)[:, -1:], torch.ones(1, length, dtype=torch.int64))
    assert all(strides == recorder.strides[0] for strides in recorder.strides)


def test_a_context_that_is_shorter_than_the_usual_timing_is_timed_with_fewer_tokens(tmp_path):
    recipe = tmp_path / "r.effspec"
    recipe.write_text(RECIPE)
    effc.compile(recipe, out=tmp_path / "out")
    timings = json.loads((tmp_path / "out" / "thin" / "measures.json").read_text())["run"]["timings"]
    assert list(timings) == ["decode.p50(prompt: 45, steps: 16)"]


def test_every_mode_gives_what_transformers_generates(llama):
    assert_generates_alike(tiny.model("llama"), load_exported_model(llama[0] / "program"))


OTHERS = ("gemma2", "gemma3_text", "opt", "phi3", "cohere", "mistral")


@pytest.mark.parametrize("name", ["llama", "gpt2", *(pytest.param(n, marks=pytest.mark.heavy) for n in OTHERS)])
def test_a_fresh_process_holds_both_programs_to_the_model(tmp_path, name):
    model = tiny.model(name)
    folder, target = emitted(tmp_path, model, context=64)
    checks = verify_forms(folder, model, target.forms())
    assert any("31 decode steps" in check.what for check in checks) and all(check.holds for check in checks)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda facts: facts | {"past": []}, "numbers or names"),
        (lambda facts: facts | {"past": [[2, -16]] * 6}, "numbers or names"),
        (lambda facts: facts | {"inputs": ["labels"]}, "numbers or names"),
        (lambda facts: {"context": 64}, "it lacks something"),
        (lambda facts: facts | {"dtype": "int64"}, "it lacks something"),
    ],
)
def test_what_a_file_says_of_a_program_is_held_against_what_programs_have(llama, tmp_path, change, words):
    folder = tmp_path / "program"
    folder.mkdir()
    for name in ("model.pt2", "step.pt2", "step.json"):
        (folder / name).write_bytes((llama[0] / "program" / name).read_bytes())
    check_exported_folder(folder)
    told = json.loads((folder / "step.json").read_text())
    (folder / "step.json").write_text(json.dumps(change(told)))
    with pytest.raises(Reject, match=words) as refused:
        check_exported_folder(folder)
    assert refused.value.diagnostics[0].slug == "refused-program"


@pytest.mark.parametrize(
    ("model", "context", "words"),
    [
        (lambda: tiny.model("llama"), 129, "a context of 129 tokens"),
        (lambda: mixers.model("mamba2"), 64, "keeps a state"),
    ],
)
def test_a_context_that_can_not_be_is_refused_in_plan(tmp_path, model, context, words):
    made = model()
    with pytest.raises(Reject, match=words):
        Pt2(path="p", context=context).foresee(context_of(tmp_path, made, recipe_of([])))


@pytest.mark.heavy
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not shutil.which("c++"), reason="there is no C++ compiler")
def test_the_lines_of_the_page_make_native_code_that_computes_the_same(llama):
    folder, _ = llama
    (lines,) = [b for b in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "aoti_compile" in b]
    lines += "\ntheirs = torch.export.load('program/model.pt2').module()(**given)"
    lines += "\nprint(float((logits - theirs).abs().max()))"
    script = lines.replace("native.pt2", f"{folder.parent}/native.pt2")
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout.split()[-1]) < 1e-4, done.stderr[-2000:]

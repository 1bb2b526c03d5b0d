"""Hints in the text: defaults of calls, and what each step does, from the process that plans."""

import importlib.util
import os
from pathlib import Path

import pytest

RECIPE = """effspec 1
model base = zoo("tiny-llama")
data calib = generated(8, length: 64)
pipeline lean(base) {
  thin = prune.channels(keep: 75% of channels)
}
expect lean { perplexity(calib) <= 3 * base }
emit lean { hf("hf") }
"""


@pytest.fixture
def started(tmp_path):
    """Sessions with options of their own."""
    pytest.importorskip("pygls", reason="the extra `editor` is not installed")
    spec = importlib.util.spec_from_file_location("editor_session", Path(__file__).with_name("conftest.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = []

    def start(**options):
        made.append(module.Editor(tmp_path, options))
        return made[-1]

    yield start
    for session in made:
        assert session.end() == 0


def hints(editor) -> list[tuple[int, int, str]]:
    everything = {"start": {"line": 0, "character": 0}, "end": {"line": 99, "character": 0}}
    found = editor.of("inlayHint", "lean.effspec", range=everything)
    return [(h["position"]["line"], h["position"]["character"], h["label"]) for h in found]


@pytest.mark.slow
def test_defaults_stand_before_the_closing_parenthesis_where_an_editor_asks_for_them(started):
    editor = started(plan=False, defaults=True)
    assert editor.open("lean.effspec", RECIPE) == []
    found = hints(editor)
    line = RECIPE.split("\n")[4]
    assert (4, len(line) - 1) in {(row, column) for row, column, _ in found}
    label = next(label for row, _, label in found if row == 4)
    assert label.startswith(", ") and "align: " in label and "keep" not in label


@pytest.mark.heavy
def test_a_step_says_how_many_modules_it_changes_and_what_goes_once_it_was_planned(started):
    editor = started()
    assert editor.open("lean.effspec", RECIPE) == []
    editor.heard("workspace/inlayHint/refresh")
    ((line, column, said),) = hints(editor)
    assert (line, column) == (4, len(RECIPE.split("\n")[4]))
    assert said == "-> 8 modules, -294.9 k params"
    child = editor.process.pid
    editor.end = lambda end=editor.end: end()
    children = Path(f"/proc/{child}/task/{child}/children")
    pids = [int(p) for p in children.read_text().split()] if children.exists() else []
    assert editor.end() == 0
    editor.end = lambda: 0
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_model_that_takes_long_to_look_at_holds_nobody_up_and_is_told_of_when_it_is_there():
    pytest.importorskip("pygls", reason="the extra `editor` is not installed")
    import threading

    from effc.compiler.cli.editor.models import PATIENCE, Models

    models, go, told = Models(), threading.Event(), threading.Event()
    models.notify = told.set

    def find():
        go.wait(60)

    first = models.look_up_in_background("large", find)
    assert not first.done() and models.look_up_in_background("large", find) is first and not told.is_set()
    models.forget()
    assert models.look_up_in_background("large", find) is first  # it is still being looked at
    go.set()
    assert told.wait(60) and first.result() is None
    models.forget()
    assert models.look_up_in_background("large", lambda: None) is not first and PATIENCE <= 0.05

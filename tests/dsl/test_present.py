"""What `check` says beyond the language: files that are not there, and arguments that a running word blames."""

import os

import pytest
from effc.compiler.core.error_location import diagnostics_located_at
from effc.compiler.driver import api
from effc.compiler.inputs.windows import find_files
from effc.dsl.checker.recipe import Invocation
from effc.dsl.syntax.diagnostics import Fault, Reject
from effc.dsl.syntax.source import Source, Span

RECIPE = """effspec 1
model base = zoo("tiny-llama")
data calib = text("{path}", length: 64)
pipeline lean(base) {{ fit = tune.heal(data: calib) }}
emit lean {{ rttc("client", knowledge: "kb.jsonl", policy: rag, reward: "self", embed: "minilm") }}
"""
off = Fault("test-off", "Something is off.")


def warned(tmp_path, path: str) -> list[tuple[str, str]]:
    recipe = tmp_path / "lean.effspec"
    recipe.write_text(RECIPE.format(path=path))
    checked = api.open_session(recipe, cache_dir=tmp_path / "cache").check()
    assert not checked.errors and checked.recipes
    return [(d.message, d.span.text) for d in checked.diagnostics if d.slug == "missing-file"]


def test_a_path_that_leads_nowhere_is_a_warning_at_its_place(tmp_path):
    assert warned(tmp_path, "calib.txt") == [
        ("there is no file `calib.txt`", '"calib.txt"'),
        ("there is no file `kb.jsonl`", '"kb.jsonl"'),
        ("there is no folder `minilm`", '"minilm"'),
    ]


@pytest.mark.parametrize("path", ["calib.txt", "*.txt", "./calib.txt"])
def test_a_path_or_a_glob_that_leads_somewhere_is_none(tmp_path, path):
    (tmp_path / "calib.txt").write_text("words")
    (tmp_path / "kb.jsonl").write_text("{}")
    (tmp_path / "minilm").mkdir()
    assert warned(tmp_path, path) == []


def test_a_path_that_an_error_is_about_gets_no_warning_beside_it(tmp_path):
    (tmp_path / "r.effspec").write_text('effspec 1\nmodel m = gguf(".")\npipeline p(m) { }\nemit p { hf("x") }\n')
    found = api.open_session(tmp_path / "r.effspec", cache_dir=tmp_path / "cache").check().diagnostics
    assert [d.slug for d in found] == ["no-model"]


def test_a_pipe_and_a_folder_are_no_file_and_said_to_be_what_they_are(tmp_path):
    os.mkfifo(tmp_path / "calib.txt")
    (tmp_path / "kb.jsonl").mkdir()
    (tmp_path / "minilm").mkdir()
    assert [said for said, _ in warned(tmp_path, "calib.txt")] == [
        "`calib.txt` is a pipe, where a file is needed",
        "`kb.jsonl` is a folder, where a file is needed",
    ]
    for name, kind in (("calib.txt", "a pipe"), ("kb.jsonl", "a folder")):
        with pytest.raises(Reject) as refused:
            find_files(name, tmp_path)
        assert f"{name} is {kind}, where a file is needed" in str(refused.value) and refused.value.diagnostics[0].help


def test_a_diagnostic_of_a_running_word_points_at_the_argument_it_blames_if_the_recipe_gives_it():
    source = Source("lean.effspec", "cut(keep: 5%, on: x)")
    whole, keep = Span(source, 0, 20), Span(source, 10, 12)
    call = Invocation("cut", {}, whole, {"keep": keep})
    for argument, place in (("", whole), ("keep", keep), ("remove keep", keep), ("align", whole)):
        with pytest.raises(Reject) as refused, diagnostics_located_at(call):
            raise Reject(off("it is off", argument=argument))
        assert refused.value.diagnostics[0].span == place

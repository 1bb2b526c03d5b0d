"""The recipe library: every pass and target has a recipe, and each compiles on a model that comes with effc."""

import re
from pathlib import Path

import pytest
from effc.compiler import api
from effc.compiler.words.library import by_name, shipped, with_files
from effc.compiler.words.shelf import Shelf
from effc.dsl import ast

RECIPES = {name.removesuffix(".effspec"): r for name, r in shipped().items() if not r.is_module}
VOCABULARY = Shelf().vocabulary
# `clean.dead` asks for a model that was masked elsewhere; the other searches stand where `hill` and `nsga2` do.
# A page is drawn by packages of an extra, and `effc report` draws one of any artifact.
APART = {"clean.dead", "search.predict", "search.random", "search.heuristic", "report"}
FEW = {"steps": "2"}  # updates of what learns


def words(recipe) -> set[str]:
    pipelines = [s for s in recipe.file.statements if isinstance(s, ast.Pipeline)]
    emits = [call for s in recipe.file.statements if isinstance(s, ast.Emit) for call in s.targets]
    return {step.call.name.path for p in pipelines for step in p.steps} | {call.name.path for call in emits}


def test_every_pass_and_target_has_a_recipe():
    used = {word for recipe in RECIPES.values() for word in words(recipe)}
    assert len(RECIPES) >= 20
    for kind in ("pass", "target"):
        assert set(VOCABULARY.words(kind)) - used <= APART


def test_a_recipe_of_somebody_elses_system_says_whose():
    assert [n for n, r in RECIPES.items() if "/" in n and "Source: " not in r.doc] == []


def test_a_file_here_goes_before_the_librarys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = Path("shears/half")
    assert by_name(name) == shipped()["shears/half.effspec"].path
    (tmp_path / "shears").mkdir()
    (tmp_path / "shears" / "half").write_text("effspec 1\n")
    assert by_name(name) == name
    assert by_name(Path("../shears/half")) == Path("../shears/half") and by_name(Path("std.text")) == Path("std.text")


def test_a_copy_has_all_that_the_recipe_names(tmp_path):
    for name in ("fedreft/one-client", "multipruner/apply", "rttc/thirty-two", "quickstart"):
        recipe = RECIPES[name]
        files = with_files(recipe)
        for place, file in files.items():
            target = tmp_path / name / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
        checked = api.session(tmp_path / name / recipe.name, cache_dir=tmp_path / "cache").check()
        assert {d.slug for d in checked.diagnostics} <= {"unseen-model"}, name
    assert set(with_files(RECIPES["fedreft/one-client"])) >= {"zoo/tiny-llama/speech-train.jsonl"}


def embedded(text: str, recipe) -> str:
    """A recipe of a model that is not here, on one that is: with its data, in steps that it has."""
    beside = recipe.path.parents[1] / "zoo" / "tiny-llama"
    text = re.sub(r"(model base = )hf\(.*\)", r'\1zoo("tiny-llama")', text)
    text = re.sub(r"hub\(.*\)", f'text("{beside}/calib.txt", samples: 4, length: 64, seed: 7)', text)
    return re.sub(r"group: \d+", "group: 32", text)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Steps that several recipes have are run once."""
    return tmp_path_factory.mktemp("library") / "cache"


@pytest.mark.heavy
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_compiles_on_an_embedded_model(tmp_path, cache, name):
    recipe, few = RECIPES[name], {}
    path = recipe.path
    if "= hf(" in path.read_text():
        path = tmp_path / "r.effspec"
        path.write_text(embedded(recipe.path.read_text(), recipe))
    if "param steps" in path.read_text():
        few = FEW
    results = api.compile(path, tmp_path / "out", cache_dir=cache, threads=1, set=few)
    assert all((a.path / "manifest.json").is_file() for r in results for a in r.artifacts)
    if not few and "= hf(" not in recipe.path.read_text():
        assert [d.message for r in results for d in r.missed] == []

"""The recipe library: every pass and target has a recipe, and each compiles on a model that comes with effc."""

import json
import shutil
from pathlib import Path

import pytest
from effc.compiler.cli.main import main
from effc.compiler.cli.verbs.new import GOALS, WISHES
from effc.compiler.driver import api
from effc.compiler.plugin.library_effects import RANDOM, Effects, recipe_text_hash
from effc.compiler.plugin.recipe_library import LibraryFile, library_files, recipe_and_named_files, resolve_recipe_path
from effc.compiler.plugin.registry import Registry
from effc.dsl.syntax import ast

from tests.stand_ins import ZOO, embedded, on_model

RECIPES = {name.removesuffix(".effspec"): r for name, r in library_files().items() if not r.is_module}
VOCABULARY = Registry().vocabulary
# `clean.dead` asks for a model that was masked elsewhere. A page is drawn by packages of an extra, and `effc report`
# draws one of any artifact. Open steps don't compile: `effc tune` replaces them.
MAX_ERROR = {"clean.dead", "report", "search.steps"}
MIN_SAMPLES = {"steps": "2"}  # updates of what learns


def words(recipe) -> set[str]:
    pipelines = [s for s in recipe.file.statements if isinstance(s, ast.Pipeline)]
    emits = [call for s in recipe.file.statements if isinstance(s, ast.Emit) for call in s.targets]
    return {step.call.name.path for p in pipelines for step in p.steps} | {call.name.path for call in emits}


def test_every_pass_and_target_has_a_recipe():
    used = {word for recipe in RECIPES.values() for word in words(recipe)}
    assert len(RECIPES) >= 20
    for kind in ("pass", "target"):
        assert set(VOCABULARY.words(kind)) - used <= MAX_ERROR


def test_a_recipe_of_somebody_elses_system_says_whose():
    assert [n for n, r in RECIPES.items() if "/" in n and "Source: " not in r.doc] == []


def test_a_recipe_that_was_not_shown_to_help_a_larger_model_says_first_that_it_teaches():
    """Help: a smaller or faster SmolLM2 whose perplexity is at most a fifth higher. Published settings name their models."""
    effects = Effects.read()
    for name, recipe in RECIPES.items():
        rows = [row for e in effects.effects_of_recipe(recipe) if e.on.startswith("SmolLM2") for row in e.rows]
        ratios = [after / before for _, metric, _, before, after in rows if "perplexity" in metric and before]
        helps = bool(ratios) and max(ratios) <= 1.2
        assert recipe.sentence.startswith("Teaching recipe: ") == (not helps and "= hf(" not in recipe.text), name


def test_measured_effects_are_of_recipes_as_they_are_now():
    effects = Effects.read()
    assert set(effects.stored) <= set(RECIPES)
    changed = [name for name, kept in effects.stored.items() if kept["of"] != recipe_text_hash(RECIPES[name])]
    assert changed == [], "measure them again: python -m bench.recipes NAME"
    for name in effects.stored:
        for effect in effects.effects_of_recipe(RECIPES[name]):
            drawn = "= config(" in RECIPES[name].text
            assert effect.random == drawn and (RANDOM in effect.text()) == drawn, name
            facts = effects.machines[effect.machine]
            assert {"cpu", "threads", "torch", "transformers"} <= set(facts) and effect.seconds > 0


def test_an_effect_of_a_recipe_that_was_changed_is_not_told(tmp_path):
    effects = Effects.read()
    name = next(iter(effects.stored))
    recipe, path = RECIPES[name], tmp_path / "changed.effspec"
    path.write_text(recipe.text + "\n# a remark\n")
    assert effects.effects_of_recipe(LibraryFile(recipe.name, path)) == effects.effects_of_recipe(recipe) != ()
    path.write_text(recipe.text.replace("effspec 1", "effspec 1\nparam more: int = 1 in 1..2", 1))
    assert effects.effects_of_recipe(LibraryFile(recipe.name, path)) == ()


def test_a_file_here_goes_before_the_librarys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = Path("papers/shears/sparse-50")
    assert resolve_recipe_path(name) == library_files()["papers/shears/sparse-50.effspec"].path
    (tmp_path / "papers" / "shears").mkdir(parents=True)
    (tmp_path / "papers" / "shears" / "sparse-50").write_text("effspec 1\n")
    assert resolve_recipe_path(name) == name
    assert resolve_recipe_path(Path("../papers/shears/sparse-50")) == Path(
        "../papers/shears/sparse-50"
    ) and resolve_recipe_path(Path("std.text")) == Path("std.text")


def test_a_copy_has_all_that_the_recipe_names(tmp_path):
    for name in ("papers/fedreft/one-client", "papers/multipruner/apply", "papers/rttc/ttt-32", "quickstart"):
        recipe = RECIPES[name]
        files = recipe_and_named_files(recipe)
        for place, file in files.items():
            target = tmp_path / name / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
        checked = api.open_session(tmp_path / name / recipe.name, cache_dir=tmp_path / "cache").check()
        assert {d.slug for d in checked.diagnostics} <= {"unseen-model"}, name
    assert set(recipe_and_named_files(RECIPES["papers/fedreft/one-client"])) >= {"zoo/tiny-llama/speech-train.jsonl"}


SMOLLM2 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


@pytest.mark.slow
def test_amounts_and_groups_of_a_recipe_fit_other_decoders(tmp_path):
    """Heads that can be shared out, groups that divide: on the shapes of SmolLM2-135M, with the embedded tokenizer."""
    folder = tmp_path / "m"
    shutil.copytree(ZOO, folder, ignore=lambda _, names: [n for n in names if not n.startswith("tokenizer")])
    (folder / "config.json").write_text(json.dumps(SMOLLM2))
    for name, recipe in RECIPES.items():
        if 'zoo("tiny-llama")' in recipe.text:
            path = tmp_path / "r.effspec"
            path.write_text(on_model(recipe.text, 'config("m/config.json")'))
            checked = api.open_session(path, cache_dir=tmp_path / "cache").check(resolve=True)
            assert [d.message for d in checked.diagnostics if d.severity == "error"] == [], name


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
        path.write_text(embedded(recipe.path.read_text()))
    if "param steps" in path.read_text():
        few = MIN_SAMPLES
    results = api.compile(path, tmp_path / "out", cache_dir=cache, threads=1, set=few)
    assert all((a.path / "manifest.json").is_file() for r in results for a in r.artifacts)
    if not few and "= hf(" not in recipe.path.read_text():
        assert [d.message for r in results for d in r.missed] == []


@pytest.mark.heavy
@pytest.mark.parametrize("goal", [goal for goal in GOALS if goal not in WISHES])
def test_a_recipe_that_new_writes_compiles_and_keeps_its_bounds(tmp_path, monkeypatch, cache, goal):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "--goal", goal]) == 0
    (path,) = tmp_path.glob("*.effspec")
    (result,) = api.compile(path, tmp_path / "out", cache_dir=cache, threads=1)
    assert [(a.path / "manifest.json").is_file() for a in result.artifacts] == [True]
    assert [d.message for d in result.missed] == []


@pytest.mark.heavy
@pytest.mark.parametrize("goal", WISHES)
def test_a_wish_that_new_writes_is_tuned_and_keeps_its_bounds(tmp_path, monkeypatch, cache, goal):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "--goal", goal]) == 0
    (path,) = tmp_path.glob("*.effspec")
    path.write_text(path.read_text().replace("30min", "4min"))
    assert main(["tune", str(path), "--cache-dir", str(cache), "--threads", "1"]) == 0

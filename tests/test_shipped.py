"""What ships with effc is what its own tools make."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from effc.compiler.analysis.discovery.structure import discover_skeleton_without_weights
from effc.compiler.driver import api
from effc.compiler.driver.models import resolve_origin
from effc.compiler.inputs.sources.zoo import zoo_folders_by_name
from effc.compiler.plugin.recipe_library import library_files
from effc.dsl.checker.skeleton import Skeleton
from effc.dsl.syntax import ast
from effc.dsl.syntax.format import format_source
from effc.dsl.syntax.render import render

from tests.worlds import context


def without_what_a_release_of_transformers_calls_otherwise(skeleton: Skeleton) -> Skeleton:
    """Releases differ in the lines of a file that reasons quote, and in the name of Mamba-2's gated norm."""
    parts = tuple(
        replace(part, kind=part.kind.replace("Mamba2RMSNormGated", "MambaRMSNormGated")) for part in skeleton.parts
    )
    opaque = tuple((path, reason.partition(" at modeling_")[0]) for path, reason in skeleton.opaque)
    return replace(skeleton, parts=parts, opaque=opaque)


@pytest.mark.parametrize("name", sorted(zoo_folders_by_name()))
def test_the_shipped_skeleton_is_the_one_that_is_discovered(tmp_path, name):
    shipped = Skeleton.from_json(json.loads((zoo_folders_by_name()[name] / "skeleton.json").read_text()))
    actual = discover_skeleton_without_weights(resolve_origin(f"zoo:{name}", context(tmp_path).settings))
    same = without_what_a_release_of_transformers_calls_otherwise
    assert same(shipped) == same(actual)


LIBRARY = library_files()
MODULES = [name for name, recipe in LIBRARY.items() if recipe.is_module]


def names(recipe, kind) -> list[str]:
    return [s.name.path for s in recipe.file.statements if isinstance(s, kind)]


def using(recipe, args=None) -> str:
    """A recipe that uses all that a module has: every pipeline in a row on the zoo's model, all data in bounds."""
    alias = recipe.name.rpartition(".")[2]
    data = [s.name.path for s in recipe.file.statements if isinstance(s, ast.Declare) and s.kind == "data"]
    steps = [f"  {name} = {alias}.{name}({(args or {}).get(name, '')})" for name in names(recipe, ast.Pipeline)]
    bounds = [f"  perplexity({alias}.{name}) <= 9 * base" for name in data] or ["  params <= 0.9 * base"]
    return "\n".join(
        [
            "effspec 1",
            f"use {recipe.name}",
            'model base = zoo("tiny-llama")',
            "pipeline all(base) {",
            *(steps or ["  bald = prune.heads(keep: 50% of heads)"]),
            "}",
            "expect all {",
            *bounds,
            "}",
            'emit all { hf("all") }',
            "",
        ]
    )


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_a_shipped_recipe_is_in_style_and_says_what_it_is(name):
    recipe = LIBRARY[name]
    assert recipe.sentence.endswith(".")
    assert format_source(recipe.file.source) == recipe.file.source.text


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_a_shipped_recipe_checks_without_a_word(tmp_path, name):
    path = LIBRARY[name].path
    if name in MODULES:
        path = tmp_path / "user.effspec"
        path.write_text(using(LIBRARY[name]))
    checked = api.open_session(path, cache_dir=tmp_path).check()
    hub = '= hf("' in path.read_text() or "= config(" in path.read_text()  # its skeleton is not here
    assert {d.slug for d in checked.diagnostics} == ({"unseen-model"} if hub else set()), render(checked.diagnostics)


@pytest.mark.slow
def test_the_pipelines_of_the_library_compile_one_after_another(tmp_path):
    few = "score: perplexity(few)"
    args = {
        "shallow": few,
        "narrow": "keep: 50%",
        "grouped": "heads: 75%",
        "lean": f"keep: 95%, remove: 1, align: 96, {few}",
    }
    module = LIBRARY["std.prune"]
    assert args.keys() == set(names(module, ast.Pipeline))
    text = f'data few = text("{zoo_folders_by_name()["tiny-llama"]}/calib.txt", samples: 1, length: 32)\npipeline'
    (tmp_path / "user.effspec").write_text(using(module, args).replace("pipeline", text, 1))
    (result,) = api.compile(tmp_path / "user.effspec", tmp_path / "out", cache_dir=tmp_path / "cache", threads=1)
    sizes = [result.plan.stages[0].before.params, *(s.after.params for s in result.plan.stages)]
    assert len(sizes) == 6 and sizes == sorted(sizes, reverse=True)
    assert not result.missed


def readme_recipe() -> str:
    """The first recipe of the README."""
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    return next(block for block in text.split("```")[1::2] if block.lstrip().startswith("effspec 1")).lstrip()


def test_the_recipe_of_the_readme_checks_and_plans_in_an_empty_folder(tmp_path):
    (tmp_path / "r.effspec").write_text(readme_recipe())
    session = api.open_session(tmp_path / "r.effspec", cache_dir=tmp_path / "cache")
    assert session.check().diagnostics == ()
    (plan,) = api.plan_all_pipelines(session)
    assert plan.has_work and len(plan.stages) == 1


@pytest.mark.heavy
def test_the_recipe_of_the_readme_compiles_in_an_empty_folder_and_keeps_its_bounds(tmp_path):
    (tmp_path / "r.effspec").write_text(readme_recipe())
    (result,) = api.compile(tmp_path / "r.effspec", tmp_path / "out", cache_dir=tmp_path / "cache", threads=1)
    assert not result.missed and (tmp_path / "out" / "tiny-llama-small" / "manifest.json").is_file()

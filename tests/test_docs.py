"""What the pages say is so: recipes check, links lead somewhere, files, verbs and exit codes are those that there are."""

import re
from pathlib import Path

import pytest
from effc.compiler import api
from effc.compiler.cli import app
from effc.compiler.commands.exits import MEANINGS
from effc.dsl.diagnostics import EXITS
from effc.dsl.render import render
from typer.main import get_command

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
RECIPES = [
    (name, number, block)
    for name, text in TEXTS.items()
    for number, block in enumerate(re.findall(r"^```\w*\n(effspec 1\n.*?)^```", text, re.M | re.S))
]


@pytest.mark.parametrize(("name", "number", "recipe"), RECIPES, ids=[f"{name}-{number}" for name, number, _ in RECIPES])
def test_a_whole_recipe_of_a_page_checks_in_an_empty_folder(tmp_path, name, number, recipe):
    path = tmp_path / "r.effspec"
    path.write_text(recipe, encoding="utf-8")
    found = [d for d in api.check(path, cache_dir=tmp_path).diagnostics if d.severity == "error"]
    assert not found, render(found)


@pytest.mark.parametrize("name", TEXTS)
def test_a_link_leads_to_a_file(name):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", TEXTS[name])
    assert [link for link in links if not (ROOT / name).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_a_file_that_a_page_names_is_there(name):
    named = re.findall(r"`((?:dsl|compiler|passes|kernels|tests|docs)/[\w./]+)`", TEXTS[name])
    gone = [path for path in named if not path.isupper() and "NAME" not in path and not (ROOT / path).exists()]
    assert len(named) > 20 and gone == []


def test_the_page_of_the_command_line_has_every_verb_and_exit_code():
    page = TEXTS["docs/cli.md"]
    assert [verb for verb in get_command(app()).commands if f"`effc {verb}`" not in page] == []
    for name, code in EXITS.items():
        assert f"| {code} | {MEANINGS[name]} |" in page


def test_the_page_of_python_has_every_option():
    from effc.compiler.artifacts.load import LoadOptions

    page = TEXTS["docs/python-api.md"]
    assert [o for o in (*api.Options.__annotations__, *LoadOptions.__annotations__) if f"`{o}`" not in page] == []


def test_the_options_of_a_function_are_those_of_the_settings():
    from dataclasses import fields
    from inspect import signature

    from effc.compiler.artifacts.load import LoadOptions, load
    from effc.compiler.words.context import Settings

    assert {*api.Options.__annotations__} == {f.name for f in fields(Settings)} - {"watch", "deadline"} | {
        "settings",
        "set",
        "params",
    }
    assert {*LoadOptions.__annotations__} == {*signature(load).parameters} - {"path"}


def test_an_option_that_is_none_is_refused(tmp_path):
    with pytest.raises(TypeError, match="effc knows no option `thread`"):
        api.check(tmp_path / "r.effspec", thread=2)


def test_files_and_folders_may_be_texts_in_python(tmp_path):
    (tmp_path / "values.json").write_text('{"keep": "80%"}')
    (tmp_path / "r.effspec").write_text(
        'effspec 1\nparam keep: ratio = 50%\nmodel m = zoo("tiny-llama")\n'
        'pipeline p(m) { s = prune.channels(keep: keep of channels) }\nemit p { hf("x") }\n'
    )
    where = {"cache_dir": str(tmp_path / "cache"), "params": str(tmp_path / "values.json")}
    (made,) = api.plan(str(tmp_path / "r.effspec"), **where)
    assert made.recipe.params["keep"].value == 0.8


def test_a_newcomer_reads_the_readme_to_the_end():
    assert len(TEXTS["README.md"].splitlines()) <= 160

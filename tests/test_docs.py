"""What the pages say is so: recipes check, links lead somewhere, files, verbs and exit codes are those that there are."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from effc.compiler.cli.explain import slug_and_call_of_all_faults
from effc.compiler.cli.main import make_app
from effc.compiler.cli.verbs.exit_codes import MEANINGS
from effc.compiler.driver import api
from effc.compiler.plugin.registry import SHELVES, Registry
from effc.dsl.syntax.diagnostics import EXITS
from effc.dsl.syntax.render import render
from typer.main import get_command

from bench.tables import TABLES, with_tables

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
RECIPES = [
    (name, number, block)
    for name, text in TEXTS.items()
    for number, block in enumerate(re.findall(r"^```[^`\n]*\n(effspec 1\n.*?)^```", text, re.M | re.S))
    if name != "docs/plugins.md"  # whose package tests/compiler/plugin/test_plugin_packages.py installs
]


@pytest.mark.parametrize(("name", "number", "recipe"), RECIPES, ids=[f"{name}-{number}" for name, number, _ in RECIPES])
def test_a_whole_recipe_of_a_page_checks_in_an_empty_folder(tmp_path, name, number, recipe):
    """Where it names a model of the reader's, that alone is missing."""
    path = tmp_path / "r.effspec"
    path.write_text(recipe, encoding="utf-8")
    errors = [d for d in api.check(path, cache_dir=tmp_path).diagnostics if d.severity == "error"]
    found = [d for d in errors if d.fault.slug != "no-model"]
    assert not found, render(found)


BEFORE = """effspec 1
use std.text
model base = zoo("tiny-llama")
data calib = synthetic(4, length: 32)
"""
PARTS = [
    (name, number, block)
    for name in TEXTS
    for number, block in enumerate(re.findall(r"^```\w*\n(pipeline \w+\(base\) \{\n.*?)^```", TEXTS[name], re.M | re.S))
]


@pytest.mark.parametrize(("name", "number", "part"), PARTS, ids=[f"{name}-{number}" for name, number, _ in PARTS])
def test_a_pipeline_of_a_page_checks_where_it_is_given_a_model_and_data(tmp_path, name, number, part):
    emits = "" if "\nemit " in part else f'emit {part.split()[1].partition("(")[0]} {{ hf("x") }}\n'
    path = tmp_path / "r.effspec"
    path.write_text(BEFORE + part + emits, encoding="utf-8")
    found = [d for d in api.check(path, cache_dir=tmp_path).diagnostics if d.severity == "error"]
    assert not found, render(found)


def _lines(text: str) -> list[str]:
    """Command lines of a page: in a block, or between backticks."""
    blocks = re.findall(r"^```[^`\n]*\n(.*?)^```", text, re.M | re.S)
    in_blocks = [line for block in blocks for line in re.findall(r"^(?:\$ )?(effc [a-z].*)", block, re.M)]
    return in_blocks + re.findall(r"`(effc [a-z][^`\n]*)`", text)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.slow
def test_a_command_line_of_a_page_names_a_verb_and_options_that_it_has(name):
    for line in _lines(TEXTS[name]):
        command, (_, *words) = get_command(make_app()), line.partition("  #")[0].split()
        assert words[0] in command.commands, line
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        known = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
        asked = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert asked <= known | {"--help", "-h"}, f"{line}: {asked - known}"


@pytest.mark.parametrize("name", TEXTS)
def test_a_link_leads_to_a_file(name):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", TEXTS[name])
    assert [link for link in links if not (ROOT / name).parent.joinpath(link).exists()] == []


def test_a_table_between_marks_is_the_one_of_its_json():
    marked = {name: re.findall(r"<!-- table: (\w+) -->", text) for name, text in TEXTS.items()}
    assert sorted(name for names in marked.values() for name in names) == sorted(TABLES)
    for page in filter(marked.get, marked):
        without = re.sub(r"( -->\n)\|.*?(<!-- end)", r"\1\2", TEXTS[page], flags=re.S)
        assert without != with_tables(without) == TEXTS[page], "run python -m bench.tables"


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_a_file_that_a_page_names_is_there(name):
    named = re.findall(r"`((?:dsl|compiler|passes|kernels|tests|docs)/[\w./]+)`", TEXTS[name])
    gone = [path for path in named if not path.isupper() and "NAME" not in path and not (ROOT / path).exists()]
    assert len(named) > 20 and gone == []


def test_the_page_of_the_command_line_has_every_verb_and_exit_code():
    page = TEXTS["docs/cli.md"]
    assert [verb for verb in get_command(make_app()).commands if f"`effc {verb}`" not in page] == []
    for name, code in EXITS.items():
        assert f"| {code} | {MEANINGS[name]} |" in page


def test_the_page_of_python_has_every_option():
    from effc.compiler.artifacts.load import LoadOptions

    of_compile, _, of_load = " ".join(TEXTS["docs/python-api.md"].split()).partition("`load` takes")
    assert [o for o in api.Options.__annotations__ if f"`{o}`" not in of_compile] == []
    assert [o for o in LoadOptions.__annotations__ if f"`{o}`" not in of_load] == []


@pytest.mark.slow
def test_the_examples_of_a_model_in_memory_run_as_they_stand(tmp_path, monkeypatch):
    """With the embedded model and some of its text in place of what a user has, and five steps of training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EFFC_CACHE_DIR", str(tmp_path / "cache"))
    zoo, names = ROOT / "recipes" / "zoo" / "tiny-llama", {}
    (tmp_path / "my-texts.txt").write_text((zoo / "calib.txt").read_text(encoding="utf-8")[:12_000], encoding="utf-8")
    for page, target in (("docs/python-api.md", "slim-cpu"), ("README.md", "other-cpu")):
        block = re.search(r"^```python\n((?:import|slim = ).*?)^```", TEXTS[page], re.M | re.S)[1]
        code = (
            block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(zoo))
            .replace("slim-cpu", target)
            .replace("steps=50", "steps=5")
        )
        exec(compile(code, page, "exec"), names)
        assert (tmp_path / target / "manifest.json").is_file() and not names["slim"].missed
        assert len(code.splitlines()) <= 12


def test_no_two_headings_of_a_page_are_alike():
    headings = {name: re.findall(r"^#+ (.+)$", text, re.M) for name, text in TEXTS.items() if name != "CHANGELOG.md"}
    assert [(name, h) for name, all_of in headings.items() for h in all_of if all_of.count(h) > 1] == []


@pytest.mark.parametrize("into", ["docs", "docs/new", ".", "..", "build"])
def test_the_site_replaces_no_folder_of_the_repository_that_has_other_files(into, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    import stage

    (tmp_path / "repository" / "docs").mkdir(parents=True)
    (tmp_path / "repository" / "docs" / "page.md").write_text("# Page\n")
    monkeypatch.setattr(stage, "ROOT", tmp_path / "repository")
    (fault,) = stage.stage(tmp_path / "repository" / into)
    assert "name a folder below build/" in fault
    assert (tmp_path / "repository" / "docs" / "page.md").is_file()


TUTORIALS = [name for name in TEXTS if name.startswith("docs/tutorials/")]
RUNNERS = {"sh": ["bash", "-euc"], "python": [sys.executable, "-c"]}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_runs_from_an_empty_folder_without_a_network(tmp_path, name):
    if "curl" in TEXTS[name] and not shutil.which("curl"):
        pytest.skip("there is no curl")
    own = {"EFFC_CACHE_DIR": str(tmp_path / ".cache"), "EFFC_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | own | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for language, title, block in re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', TEXTS[name], re.M | re.S):
        if title:
            (tmp_path / title).write_text(block, encoding="utf-8")
        elif language in RUNNERS:
            ran = subprocess.run(
                [*RUNNERS[language], block], cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            assert ran.returncode == 0, f"{block}\n{ran.stdout}\n{ran.stderr}"


NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch, notebook):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EFFC_CACHE_DIR", str(tmp_path / "cache"))
    names: dict = {}
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), names)
    assert all(cell["outputs"] == [] for cell in cells)


def test_the_options_of_a_function_are_those_of_the_settings():
    from dataclasses import fields
    from inspect import signature

    from effc.compiler.artifacts.load import LoadOptions, load
    from effc.compiler.core.settings import Settings

    assert {*api.Options.__annotations__} == {f.name for f in fields(Settings)} - {"watch", "deadline"} | {
        "settings",
        "set",
        "params",
        "device_map",
    }
    assert {*LoadOptions.__annotations__} == {*signature(load).parameters} - {"path"} | {"device_map"}


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


@pytest.mark.parametrize("kind", SHELVES)
def test_the_page_of_words_has_every_word(kind):
    assert [word for word in Registry().vocabulary.words(kind) if f"`{word}`" not in TEXTS["docs/words.md"]] == []


def test_the_page_of_the_language_has_every_kind_of_data_and_of_model():
    row = {line.split("`")[1].split()[0]: line for line in TEXTS["docs/language.md"].splitlines() if line[:3] == "| `"}
    words = Registry().vocabulary.words
    assert [word for word in words("data") if f"`{word}`" not in row["data"]] == []
    assert [word for word in words("model") if f"`{word}`" not in row["model"]] == []


def test_a_newcomer_reads_the_readme_to_the_end():
    assert len(TEXTS["README.md"].splitlines()) <= 130


@pytest.mark.slow
def test_pages_of_the_site_are_staged_into_no_folder_that_has_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    staged = subprocess.run([sys.executable, ROOT / "docs/site/stage.py", tmp_path], capture_output=True, text=True)
    assert staged.returncode != 0 and "has other files" in staged.stdout + staged.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_the_site_has_every_page_in_its_navigation_and_every_word_fault_and_verb_in_its_reference(tmp_path):
    staged = subprocess.run([sys.executable, ROOT / "docs/site/stage.py", tmp_path], capture_output=True, text=True)
    assert (staged.returncode, staged.stderr) == (0, "")
    reference = "\n".join(page.read_text(encoding="utf-8") for page in (tmp_path / "reference").rglob("*.md"))
    words = [word for kind in SHELVES for word in Registry().vocabulary.words(kind)]
    verbs = [f"effc {verb}" for verb in get_command(make_app()).commands]
    headings = {*re.findall(r"^##+ `([^`]+)`", reference, re.M)}
    assert {*words, *verbs, *(slug for slug, _ in slug_and_call_of_all_faults())} - headings == set()

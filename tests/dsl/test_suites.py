"""The manual is a test: every recipe of its pages has exactly the faults that its lines are marked with."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from effc.compiler.plugin.registry import Registry
from effc.dsl.checker.check import check_recipe_file
from effc.dsl.checker.overrides import read_overrides
from effc.dsl.syntax.parse import parse
from effc.dsl.syntax.source import Source


def load(name: str):
    """A file beside this one: tests are no package."""
    spec = importlib.util.spec_from_file_location(f"dsl_{name}", Path(__file__).with_name(f"{name}.py"))
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


suite, tiny_llama = load("suite"), load("tiny_llama")
CASES = [case for page in suite.pages() for case in suite.cases(page)]
VOCABULARY = Registry().vocabulary


def diagnostics(case):
    """All that parser and checker say of a recipe."""
    parsed = parse(Source("recipe.effspec", case.text))
    texts = {name: Source(name, text) for name, text in case.modules.items()}
    checked = check_recipe_file(
        parsed.file,
        VOCABULARY,
        find_skeleton=tiny_llama.of,
        overrides=read_overrides(case.sets),
        read_module=texts.get,
        has_syntax_errors=any(d.severity == "error" for d in parsed.diagnostics),
    )
    return [*parsed.diagnostics, *checked.diagnostics]


def place(diagnostic) -> int:
    inside = diagnostic.span and diagnostic.span.source.name == "recipe.effspec"
    return diagnostic.span.line if inside else 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_recipe_of_the_manual_has_the_faults_it_is_marked_with(case, update):
    found = diagnostics(case)
    assert {(place(d), d.slug) for d in found} == case.marks
    if case.output is None:
        return
    from effc.dsl.syntax.render import render

    said = render(found)
    if update:
        rewrite(case, said)
    else:
        assert said.rstrip() == case.shown.rstrip()


def rewrite(case, said: str) -> None:
    """Put what is said now in place of the shown output; offsets are found anew."""
    page = suite.FOLDER / f"{case.page}.md"
    now = next(c for c in suite.cases(page) if (c.title, c.text) == (case.title, case.text) and c.output)
    text = page.read_text(encoding="utf-8")
    start, end = now.output
    page.write_text(text[:start] + said.rstrip() + "\n" + text[end:], encoding="utf-8")


# What no recipe on a page could show: files that are none, sizes, and an order that no pass asks for yet.
TOLD = {
    "no-recipe",
    "recipe-is-folder",
    "unreadable-recipe",
    "binary-recipe",
    "not-utf-8",
    "recipe-too-large",
    "foreign-module",
    "outside-package",
    "long-selector",
    "too-deep",
    "too-many-modules",
    "more-mistakes",
    "json-form",
    "wrong-order",
    "needs-score",
}


def test_every_fault_of_the_language_has_a_section_and_nearly_every_one_a_recipe():
    files = (Path(__file__).resolve().parents[2] / "dsl").rglob("*.py")
    slugs = {s for f in files for s in re.findall(r'Fault\(\s*"([a-z0-9-]+)"', f.read_text(encoding="utf-8"))}
    sections = {s for p in suite.pages() for s in re.findall(r"^## (.+)$", p.read_text(encoding="utf-8"), re.M)}
    shown = {case.title for case in CASES if any(slug == case.title for _, slug in case.marks)}
    assert slugs == sections
    assert slugs - shown == TOLD

"""Every word and every fault has a page."""

import subprocess
import sys

import pytest
from effc.compiler.cli.explain import CHAPTERS, STATEMENTS, declared_fault, explain_page, slug_and_call_of_all_faults
from effc.compiler.plugin.registry import SHELVES, Registry
from effc.dsl.syntax.diagnostics import Reject
from effc.dsl.syntax.edition import HEADS

VOCABULARY = Registry().vocabulary
WORDS = sorted({name for kind in SHELVES for name in VOCABULARY.words(kind)})
FAULTS = sorted(slug_and_call_of_all_faults(), key=lambda pair: pair[0])


@pytest.mark.parametrize("name", WORDS)
def test_a_words_page_has_its_sentence_and_all_its_parameters(name):
    page = explain_page(name)
    for kind in SHELVES:
        if word := VOCABULARY.words(kind).get(name):
            assert word.summary.split("\n")[0] in page.replace("\n", " ")
            assert all(f"  {p.name}" in page and p.doc in page for p in word.params)


@pytest.mark.parametrize("slug", [slug for slug, _ in FAULTS])
def test_a_faults_page_has_its_sentence_and_exit_code(slug):
    if slug in WORDS:
        pytest.skip("a word has this name")
    page = explain_page(slug)
    assert page.startswith(f"{slug}, ")
    assert declared_fault(dict(FAULTS)[slug]).doc.split("\n\n")[0] in page


def test_a_slug_names_one_fault():
    slugs = [slug for slug, _ in FAULTS]
    assert sorted(set(slugs)) == slugs


def test_a_family_lists_its_words():
    assert "prune.channels  Make MLPs narrower" in explain_page("prune")


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(Reject) as caught:
        explain_page("perplexty")
    (fault,) = caught.value.diagnostics
    assert (fault.exit, fault.help) == (2, "did you mean `perplexity`?")


@pytest.mark.slow
def test_each_statement_is_shown_as_it_is_written():
    assert set(STATEMENTS) == set(HEADS)
    assert all(explain_page(name).startswith(f"{name} ") for name in HEADS)


def test_explaining_imports_no_torch():
    code = (
        "import sys; from effc.compiler.cli.explain import explain_page; explain_page('out-of-range'); explain_page('hf'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_a_value_and_a_parameter_name_the_pages_that_have_them():
    page = explain_page("racing")
    assert "`racing` is a value of `search` of `prune.multi`" in page and "`effc explain prune.blocks`" in page
    assert "`align` is a parameter of `prune.channels`" in explain_page("align")


def test_a_value_that_is_misspelled_is_found_as_well():
    with pytest.raises(Reject) as refused:
        explain_page("racin")
    assert refused.value.diagnostics[0].help == "did you mean `racing`?"


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_concept_has_a_chapter_of_the_manual(name):
    assert "\n# " in f"\n{explain_page(name)}" and "\n## " not in explain_page(name)

"""Warnings of a run are no progress: they reach people, runners of CI jobs, programs, the artifact and its page."""

import json

import pytest

from tests.compiler.cli.verbs.conftest import SMALL

MIN_SAMPLES = "perplexity(rows) reads 32 tokens, which a search fits"
RECIPE = SMALL.replace("samples: 4", "samples: 1").replace("emit small {", 'emit small { report("page.html")\n ')


@pytest.fixture
def warns(here):
    """A folder whose recipe scores by too few tokens."""
    recipe = RECIPE.replace("prune.channels(keep: 50% of channels, align: 8", "prune.blocks(remove: 1")
    (here / "r.effspec").write_text(recipe)
    return here


@pytest.mark.slow
def test_a_warning_of_a_run_is_on_stderr_without_progress_and_when_the_step_is_cached(effc, warns):
    for _ in range(2):
        run = effc("compile", "r.effspec", "--no-progress", "--force")
        assert run.code == 0 and run.err.count(MIN_SAMPLES) == 1 and run.err.startswith("warning[few-rows]: "), run.err
    assert MIN_SAMPLES not in effc("compile", "r.effspec", "--quiet", "--force").err


@pytest.mark.slow
def test_progress_shows_a_warning_once(effc, warns):
    assert effc("compile", "r.effspec").err.count(MIN_SAMPLES) == 1


@pytest.mark.slow
def test_an_answer_in_json_ends_with_the_warnings_and_is_no_failure(effc, warns):
    run = effc("compile", "r.effspec", "--no-progress", "--format", "json")
    (told,) = (d for d in json.loads(run.out)["diagnostics"] if d["slug"] == "few-rows")
    assert run.code == 0 and told["severity"] == "warning" and told["line"] == 5 and MIN_SAMPLES in told["message"]


@pytest.mark.slow
def test_a_runner_of_ci_jobs_gets_a_warning_at_the_line_of_its_step(effc, warns):
    run = effc("compile", "r.effspec", "--no-progress", "--format", "github")
    assert run.code == 0 and run.out.startswith("::warning file=r.effspec,line=5") and "title=few-rows" in run.out


@pytest.mark.slow
def test_the_manifest_the_card_and_the_page_tell_a_warning(effc, warns):
    assert effc("compile", "r.effspec", "--no-progress").code == 0
    (step,) = json.loads((warns / "out/small/manifest.json").read_text())["steps"]
    assert step["warnings"][0]["slug"] == "few-rows" and MIN_SAMPLES in step["warnings"][0]["message"]
    assert (
        MIN_SAMPLES in (warns / "out/small/README.md").read_text()
        and MIN_SAMPLES in (warns / "out/page.html").read_text()
    )


@pytest.mark.parametrize("verb", ["plan", "compile"])
def test_the_checker_s_warnings_are_told_once_by_whatever_works_on_the_recipe(effc, here, verb):
    (here / "r.effspec").write_text(SMALL + "expect small { bytes >= 1KB }\n")
    run = effc(verb, "r.effspec", "--no-progress", "--format", "json")
    (warning,) = (d for d in json.loads(run.out)["diagnostics"] if d["slug"] == "worse-side")
    assert run.code == 0 and warning["severity"] == "warning" and run.err.count("warning[worse-side]: `bytes` ") == 1

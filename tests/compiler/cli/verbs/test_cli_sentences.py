"""Sentences of the command line name what there is, once, and a remedy that helps."""

import json
import subprocess
import sys

import pytest

RECIPE = (
    'effspec 1\nmodel m = zoo("tiny-llama")\npipeline p(m) {{ s = prune.blocks(remove: {}) }}\nemit p {{ hf("x") }}\n'
)


def test_a_link_that_leads_nowhere_is_no_suggestion_for_itself(effc, tmp_path):
    (tmp_path / "small.effspec").symlink_to("/nowhere")
    assert "did you mean" not in effc("check", "small.effspec").err
    (tmp_path / "smaller.effspec").write_text(RECIPE.format(1))
    assert "did you mean `smaller.effspec`?" in effc("check", "small.effspec").err


@pytest.mark.parametrize("unit", ["", "%"])
def test_a_number_that_is_too_long_is_one_mistake(effc, tmp_path, unit):
    (tmp_path / "r.effspec").write_text(RECIPE.format("9" * 6000 + unit))
    errors = [line for line in effc("check", "r.effspec").err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and errors[0].startswith("error[long-number]")


def test_steps_that_can_not_be_read_are_counted_where_steps_are_listed(effc, tmp_path):
    (tmp_path / "cache" / "steps").mkdir(parents=True)
    (tmp_path / "cache").chmod(0o700)
    for number in range(2):
        (tmp_path / "cache" / "steps" / f"{number:064x}.json").write_text("{")
    run = effc("cache", "ls", "--cache-dir", "cache")
    assert "2 steps of cache are damaged" in run.err and "`effc cache verify`" in run.err
    assert "holds no finished step" not in run.err
    assert json.loads(effc("cache", "ls", "--cache-dir", "cache", "--format", "json").out)["unreadable"] == 2


def test_every_verb_that_checks_signatures_calls_the_flag_alike(effc, tmp_path):
    (tmp_path / "nothing").mkdir()
    for verb in ("verify", "sign", "inspect"):
        run = effc(verb, "nothing", "--require-signature", "ed25519:x")
        assert run.code != 0 and "error[unsigned" in run.err
    for verb in ("verify", "sign"):
        assert (
            effc(verb, "nothing", "--verify-key", "ed25519:x").err
            == effc(verb, "nothing", "--require-signature", "ed25519:x").err
        )


def test_the_package_lists_its_functions_without_importing_them():
    code = "import sys, effc; print({'check', 'plan', 'compile', 'load'} <= {*dir(effc)}, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"

"""Verification: an artifact is opened in a fresh process before it is in place, and what differs is found."""

import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from effc.compiler.artifacts import verify_child
from effc.compiler.artifacts.manifest import Manifest, read_manifest
from effc.compiler.artifacts.output_comparison import compare_outputs
from effc.compiler.artifacts.verify import verify_forms
from effc.compiler.plugin.target import Form
from effc.compiler.targets.hf import FORMS, Hf
from safetensors.torch import load_file, save_file

from tests.compiler.artifacts.test_hf_target import COMPAT, MODEL, changed, emit
from tests.drafts import write_artifact
from tests.recipes_in_memory import origin_of
from tests.worlds import context, refused


@pytest.mark.slow
def test_an_artifact_is_verified_before_it_is_in_place(tmp_path):
    program = changed("llama", "uneven")
    ctx = context(tmp_path, origin_of(program.model))

    def build(folder: Path) -> Manifest:
        Hf(path="a").emit(program, folder, ctx)
        return Manifest("hf", checks=verify_forms(folder, program.model, FORMS))

    write_artifact(tmp_path / "a", build=build)
    manifest = read_manifest(tmp_path / "a")
    said = {check.what.split(":")[0] for check in manifest.checks}
    assert said == {"compat, fresh process", "compact, fresh process"}
    assert all(check.holds for check in manifest.checks) and len(manifest.checks) == 12
    assert manifest.notes[0].startswith("There is no stock checkpoint")


def test_a_target_says_which_of_its_folders_are_models(tmp_path):
    """A folder that it does not name is not opened, one that it names is, whatever it is called."""
    program = changed("llama", "nothing")
    folder = emit(program, tmp_path / "a")
    (folder / "model").rename(folder / "student")
    assert verify_forms(folder, program.model, FORMS) == ()
    checks = verify_forms(folder, program.model, (Form("student", "plain"),))
    assert {check.what.partition(":")[0] for check in checks} == {"student, fresh process"}
    assert Hf(path="a").forms() == FORMS


def test_weights_that_are_not_the_model_s_are_found(tmp_path):
    program = changed("llama", "nothing")
    folder = emit(program, tmp_path / "a")
    with torch.no_grad():
        program.model.model.layers[1].mlp.down_proj.weight[3, 5] += 0.5
    reject = refused(lambda: verify_forms(folder, program.model, FORMS))
    assert {d.slug for d in reject.diagnostics} == {"reload-differs"} and reject.exit == 1


def test_a_folder_that_does_not_load_is_told_by_its_last_line(tmp_path):
    program = changed("llama", "nothing")
    folder = emit(program, tmp_path / "a")
    weights = load_file(folder / "model" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    reject = refused(lambda: verify_forms(folder, program.model, FORMS))
    (found,) = reject.diagnostics
    assert found.slug == "reload-died" and "model.norm.weight" in found.message
    assert "Traceback" not in found.message + found.note and "--debug" in found.help
    assert "model.norm.weight" in str(reject.__cause__)  # what `--debug` prints


@pytest.mark.slow
def test_the_child_of_plain_forms_stands_alone():
    """Its file imports torch and the standard library only, so it runs without effc."""
    names = runpy.run_path(verify_child.__file__)
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            f"import runpy, sys; runpy.run_path({verify_child.__file__!r})\n"
            "print([n for n in sys.modules if n.split('.')[0] in ('effc', 'transformers')])",
        ],
        capture_output=True,
        text=True,
    )
    assert callable(names["probe_model"]) and done.stdout.strip() == "[]", done.stderr


@cache
def near_tie() -> dict[str, torch.Tensor]:
    """What a probe may say, with two best logits 1e-6 apart at the second step."""
    logits = torch.tensor([[[0.0, 5.0], [1.0, 1.000001], [3.0, 0.0]]])
    return {"logits of prefill and 2 decode steps": logits, "greedy tokens": logits.argmax(-1)}


def test_tokens_may_part_at_a_near_tie_only():
    expected, other = near_tie(), {k: v.clone() for k, v in near_tie().items()}
    other["greedy tokens"][0, 1:] = torch.tensor([0, 1])
    other["logits of prefill and 2 decode steps"][0, 2] = torch.tensor([-9.0, 9.0])
    assert all(check.holds for check in compare_outputs(COMPAT, expected, other, torch.float32))
    other["greedy tokens"][0, 0] = 0
    assert not all(check.holds for check in compare_outputs(COMPAT, expected, other, torch.float32))


def test_nan_is_a_difference():
    odd = {k: v.clone() for k, v in near_tie().items()}
    odd["logits of prefill and 2 decode steps"][0, 0, 0] = torch.nan
    assert not all(check.holds for check in compare_outputs(MODEL, near_tie(), odd, torch.float32))


def routed(off: slice, row: int) -> list[bool]:
    """Whether the check of a mixture holds, and of another model, with some tokens of a row far off; 4 are padding."""
    want = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
    want[1, :4] = 0
    got = want + 0.001 * torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    got[1, :4] = 0
    got[row, off] += torch.randn(got[row, off].shape, generator=torch.Generator().manual_seed(2)) / 2
    name = "logits of a left-padded batch"
    checks = [
        compare_outputs(MODEL, {name: want}, {name: got}, torch.float32, 0.04, has_routed_experts=it)
        for it in (True, False)
    ]
    return [check.holds for (check,) in checks]


def test_tokens_of_a_mixture_may_meet_other_experts_as_long_as_they_are_few():
    assert routed(slice(0, 0), 0) == [True, True]
    assert routed(slice(6, 12), 0) == [True, False]  # 6 of 20: one token, and those that read it


def test_a_mixture_that_is_wrong_in_the_padded_row_alone_is_refused():
    assert routed(slice(4, 12), 1) == [False, False]


def test_where_a_token_of_a_mixture_met_another_expert_its_row_may_part():
    logits = "logits of prefill and 7 decode steps"
    want = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    expected, got = {logits: want, "greedy tokens": want.argmax(-1)}, want.clone()
    got[1, 5:] = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    found = {logits: got, "greedy tokens": got.argmax(-1)}
    assert all(
        check.holds for check in compare_outputs(MODEL, expected, found, torch.float32, 0.04, has_routed_experts=True)
    )
    assert not all(check.holds for check in compare_outputs(MODEL, expected, found, torch.float32, 0.04))
    found = {logits: want, "greedy tokens": got.argmax(-1)}  # that its logits do not say
    assert not all(
        check.holds for check in compare_outputs(MODEL, expected, found, torch.float32, 0.04, has_routed_experts=True)
    )

"""The target `native` from the command line: compiled, talked to, tested, and refused in a sentence."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from effc.compiler.artifacts.load import load
from effc.compiler.inputs.sources.zoo import zoo_folders_by_name
from effc.dsl.syntax.diagnostics import Reject

from tests import tiny
from tests.compiler.cli.verbs.conftest import SCRIPT, Run

pytestmark = pytest.mark.slow

RECIPE = '''effspec 1
"""A native artifact."""

model base = zoo("tiny-llama")
data heldout = text("{texts}/heldout.txt", samples: 4, length: 64, seed: 7)

pipeline lean(base) {{
  thin = prune.channels(keep: 75% of channels, align: 32)
}}

expect lean {{
  params <= 0.9 * base
  bytes <= 0.5 * base
  perplexity(heldout) <= 3 * base
}}

emit lean {{ native("cpu") }}
'''


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    (folder / "r.effspec").write_text(RECIPE.format(texts=zoo_folders_by_name()["tiny-llama"]), encoding="utf-8")
    env = {**os.environ, "EFFC_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "cli-cache")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "compile", "r.effspec", "--no-progress"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    return folder / "out" / "cpu", Run(done.returncode, done.stdout, done.stderr)


def test_it_compiles_is_verified_in_a_fresh_process_and_keeps_its_bounds(artifact):
    path, run = artifact
    assert run.code == 0, run.err
    measures = json.loads((path / "measures.json").read_text())
    checks = measures["checks"]
    assert len(checks) == 6 and all(c["worst"] <= c["tolerance"] for c in checks)
    assert {e["outcome"] for e in measures["expectations"]} == {"holds"}
    facts = json.loads((path / "native" / "plan.json").read_text())["facts"]
    assert facts["isa"] == "portable" and facts["byte_order"] == sys.byteorder


def test_inspect_shows_the_steps_of_a_token_the_packed_weights_and_what_went(effc, artifact):
    path, _ = artifact
    told = effc("inspect", path)
    assert told.code == 0 and "LlamaForCausalLM, 1.54 M parameters, context of 512 tokens" in told.out, told.err
    assert "57 linear" in told.out and "8 attention" in told.out and "288 -25%" in told.out
    rows = [line.split() for line in told.out.splitlines() if line.startswith("  dense_linear ")]
    assert ["dense_linear", "288", "x", "128", "16"] in [row[:5] for row in rows] and "zeros" not in told.out
    (model,) = json.loads(effc("inspect", path, "--format", "json").out)["models"]
    size = sum(weights["bytes"] for weights in model["plan"]["weights"])
    entries = json.loads((path / "native" / "plan.json").read_text())["entries"]
    assert size == sum(entry["bytes"] for entry in entries.values())
    layer = effc("inspect", path, "--graph", "0")
    assert layer.code == 2 and "holds one plan for the whole model" in layer.err


@pytest.mark.parametrize(
    "harm",
    [
        lambda b: b["facts"].pop("class"),
        lambda b: b["facts"].update(params="many"),
        lambda b: b["plan"].update(context="long"),
        lambda b: b["plan"].update(steps=3),
        lambda b: b["plan"].pop("steps"),
    ],
)
def test_inspect_refuses_a_plan_that_somebody_edited(effc, artifact, tmp_path, harm):
    place = tmp_path / "cpu"
    shutil.copytree(artifact[0], place)
    body = json.loads((place / "native" / "plan.json").read_text())
    harm(body)
    (place / "native" / "plan.json").write_text(json.dumps(body))
    run = effc("inspect", place)
    assert run.code == 5 and "error[native-damaged]" in run.err, run.err


def test_inspect_says_which_files_somebody_changed_and_draws_what_is_there(effc, artifact, tmp_path):
    copy = tmp_path / "cpu"
    shutil.copytree(artifact[0], copy)
    weights = copy / "native" / "weights.bin"
    body = bytearray(weights.read_bytes())
    body[-1] ^= 1
    weights.write_bytes(body)
    run = effc("inspect", copy)
    assert run.code == 0 and "LlamaForCausalLM" in run.out
    assert "warning[changed-file]" in run.err and "native/weights.bin has other content" in run.err
    answer = json.loads(effc("inspect", copy, "--format", "json").out)
    assert [d["slug"] for d in answer["diagnostics"]] == ["changed-file"]
    assert "changed-file" not in effc("inspect", artifact[0]).err


def test_a_prompt_that_is_no_text_and_a_folder_that_is_not_there_are_said_to_be_so(effc, artifact):
    run = effc("run", artifact[0], "-p", "a \udc80")
    assert run.code == 2 and "`--prompt` is not UTF-8" in run.err
    missing = effc("verify", "nothere")
    assert missing.code == 5 and "there is no folder `nothere`" in missing.err


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_a_pipe_that_brings_no_text_is_said_to_do_so(artifact, locale):
    """Python keeps its bytes as lone surrogates, which no tokenizer takes."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, "run", str(artifact[0])],
        input=b"a \xff\xfe",
        env={**os.environ, "LC_ALL": locale},
        capture_output=True,
        timeout=120,
    )
    assert run.returncode == 2 and b"error[prompt-not-utf-8]: the text of the pipe is not UTF-8" in run.stderr


def test_run_answers_as_text_and_as_json(effc, artifact):
    path, _ = artifact
    told = effc("run", path, "-p", "In the beginning", "-n", "12")
    assert told.code == 0 and told.out.strip()
    said = json.loads(effc("run", path, "-p", "In the beginning", "-n", "12", "--format", "json").out)
    assert said["text"].strip() == told.out.strip() and said["new_tokens"] <= 12
    again = [effc("run", path, "-p", "In the beginning", "-n", "12", "-t", "1.5", "--seed", "4").out for _ in range(2)]
    assert again[0] == again[1] != told.out


def test_the_engine_takes_as_many_threads_as_were_asked_for(artifact, monkeypatch):
    from effc.compiler.core.settings import Settings
    from effc.compiler.driver.models import open_model

    monkeypatch.setattr("effc.kernels.engine.usable_cores", lambda: 4)
    before = torch.get_num_threads()
    for threads in (1, 3):
        opened = open_model(str(artifact[0]), Settings(artifact[0].parent / "cache", threads=threads))
        assert opened.model.engine.threads == threads
    torch.set_num_threads(before)


def test_a_model_that_can_not_speak_is_refused_before_its_weights_are_read(effc, artifact, tmp_path):
    place = tmp_path / "cpu"
    shutil.copytree(artifact[0], place, ignore=shutil.ignore_patterns("token*", "weights.bin", "chat_template*"))
    assert effc("run", place, "-p", "And").err.startswith("error[no-words]")
    assert effc("serve", place).err.startswith("error[no-words]")


def test_no_model_is_opened_that_takes_more_memory_than_is_allowed(effc, artifact):
    run = effc("run", artifact[0], "-p", "And", "-n", "2", "--max-memory", "10MiB")
    assert run.code == 6 and run.err.startswith("error[memory-bound]") and "10.0 MiB are allowed" in run.err
    assert effc("run", artifact[0], "-p", "And", "-n", "2", "--max-memory", "8GiB").code == 0


@pytest.mark.slow
def test_it_answers_without_the_models_of_transformers_whose_import_takes_seconds(artifact):
    code = (
        "import sys\nfrom effc.compiler.cli.main import main\n"
        f"sys.argv = ['effc', 'run', {str(artifact[0])!r}, '-p', 'And', '-n', '2']\n"
        "try:\n    main()\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "print(sorted({'transformers.modeling_utils', 'transformers.models.llama'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_form_of_the_artifact_runs_as_the_artifact_does(effc, artifact):
    path, _ = artifact
    first, second = (effc("run", p, "-p", "And", "-n", "5") for p in (path, path / "native"))
    assert (first.code, first.out) == (second.code, second.out) and first.code == 0


def test_test_measures_its_bounds_again(effc, artifact):
    path, _ = artifact
    run = effc("test", path, "--no-progress")
    assert run.code == 0 and "ok: 3 bounds kept" in run.err


def test_a_byte_that_changed_is_found_by_test_and_by_load(effc, artifact, tmp_path):
    path, _ = artifact
    copy = shutil.copytree(path.parent.parent, tmp_path / "copy") / "out" / "cpu"
    table = json.loads((copy / "native" / "plan.json").read_text())["entries"]
    at = table["model.norm.weight"]["at"]
    weights = bytearray((copy / "native" / "weights.bin").read_bytes())
    weights[at] ^= 1
    (copy / "native" / "weights.bin").write_bytes(weights)
    with pytest.raises(Reject) as caught:
        load(copy)
    assert caught.value.diagnostics[0].fault.slug == "native-damaged"
    run = effc("test", copy, "--no-progress")
    assert run.code == 5 and "error[artifact-edited]" in run.err and "weights.bin" in run.err


def test_a_token_that_has_another_name_is_found_by_load(artifact, tmp_path):
    copy = shutil.copytree(artifact[0], tmp_path / "cpu")
    file = copy / "native" / "tokenizer.json"
    text = file.read_text("utf-8")
    assert text.count('"and": ') == 1
    file.write_text(text.replace('"and": ', '"dna": '), "utf-8")
    with pytest.raises(Reject, match="artifact-edited"):
        load(copy)
    load(copy, check="size")


def test_what_the_engine_can_not_run_is_refused_with_node_module_and_line(effc, tmp_path):
    config = tiny.config("llama", hidden_act="mish").to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
    }
    (tmp_path / "mish.json").write_text(json.dumps(config, default=str))
    (tmp_path / "r.effspec").write_text(
        'effspec 1\n"""Refused."""\n\nmodel base = config("mish.json", seed: 0)\n\n'
        "pipeline lean(base) {\n  slim = prune.channels(keep: 75% of channels)\n}\n\n"
        'emit lean { native("cpu") }\n'
    )
    run = effc("compile", "r.effspec", "--no-progress")
    assert run.code == 5 and "error[cannot-run-natively]: node `" in run.err
    assert "mlp.act_fn (MishActivation, activations.py:" in run.err
    assert not (tmp_path / "out" / "cpu").exists()


def test_pick_says_that_one_model_holds_no_points_before_it_asks_for_limits(effc, artifact):
    done = effc("pick", str(artifact[0]))
    assert done.code == 2 and "error[no-front]" in done.err and "`native`" in done.err

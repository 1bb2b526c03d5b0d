"""plan, compile, test, diff, inspect, run, cache, doctor on the zoo's model."""

import json
import os
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from effc.compiler.inputs.sources.zoo import zoo_folders_by_name


@pytest.mark.slow
def test_compile_ends_with_a_table_and_the_line_that_was_missed(compiled):
    folder, run = compiled
    assert run.code == 4
    lines = run.out.splitlines()
    assert lines[0].startswith("small -> out/small  hf, ")
    assert lines[1].split() == ["before", "after", "change", "bound"]
    assert any(line.split()[0] == "params" and line.endswith("<= 0.9 * base  holds") for line in lines)
    quality = next(line for line in lines if "perplexity" in line)
    assert quality.startswith("  perplexity(data: heldout) ") and quality.endswith("  <= 0.5 * base  fails")
    assert "error[expectation-missed]: `perplexity(data: heldout)` is " in run.err
    assert "  --> r.effspec:13:3\n  13 |   perplexity(data: heldout) <= 0.5 * base\n     |   ^^^" in run.err
    assert (folder / "out" / "small" / "manifest.json").is_file()


def test_progress_is_plain_lines_where_there_is_no_terminal(compiled):
    _, run = compiled
    first = next(line for line in run.err.splitlines() if "thin" in line and "…" not in line)  # no heartbeat
    assert first.split()[:3] == ["1/2", "thin", "prune.channels"] and " params  " in first
    assert "\x1b" not in run.err and "\r" not in run.err


def test_events_are_json_lines(compiled):
    folder, _ = compiled
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [e["stage"] for e in events if e["event"] == "StageEnded"] == ["thin", "emit hf"]


def test_an_output_that_exists_is_not_replaced_unless_forced(effc, compiled, monkeypatch):
    folder, _ = compiled
    before = (folder / "out" / "small" / "manifest.json").read_bytes()
    run = effc("compile", folder / "r.effspec", "-o", folder / "out", "--no-progress")
    assert run.code == 2 and "error[output-exists]" in run.err and "--force" in run.err
    assert "thin" not in effc("compile", folder / "r.effspec", "-o", folder / "out", "--cache-dir", "none").err
    assert (folder / "out" / "small" / "manifest.json").read_bytes() == before


def test_an_output_folder_that_is_none_is_refused_before_work(effc, write, tmp_path):
    (tmp_path / "out").write_text("in the way")
    run = effc("compile", write())
    assert (run.code, run.out) == (5, "") and "thin" not in run.err.split("\n")[0]
    assert run.err.startswith("error[output-unwritable]: out: it is a file, not a folder\n  --> r.effspec:")
    assert "prune.channels  -" not in run.err  # no stage was run


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_without_permission_is_refused_before_work(effc, write, tmp_path):
    (tmp_path / "out").mkdir(mode=0o555)
    run = effc("compile", write())
    assert (run.code, run.out) == (5, "")
    assert run.err.startswith("error[output-unwritable]: out: this user can't write there\n  --> r.effspec:")


def test_plan_says_what_is_cached_and_whether_there_is_work(effc, compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFC_CACHE_DIR", str(compiled[0] / "cache"))
    folder, _ = compiled
    fresh = effc("plan", folder / "r.effspec", "--cache-dir", tmp_path / "empty", "--detailed-exitcode")
    assert fresh.code == 7 and "prune.channels" in fresh.out
    saved = effc("plan", folder / "r.effspec", "-o", "p.json", "--detailed-exitcode")
    assert saved.code == 0 and "saved to p.json" in saved.err and "0 of 1 steps to run" in saved.out
    assert json.loads((tmp_path / "p.json").read_text())["plans"][0]["pipeline"] == "small"


@pytest.mark.slow
def test_weights_that_do_not_fit_their_config_are_refused_by_the_plan(effc, write, tmp_path):
    folder = shutil.copytree(zoo_folders_by_name()["tiny-llama"], tmp_path / "m")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"intermediate_size": 384', '"intermediate_size": 512'))
    run = effc("plan", write(model='hf("./m")'))
    assert (run.code, run.out) == (5, "")
    assert "down_proj.weight` is 128 x 384 in the weights and 128 x 512 by the config, and 23 more" in run.err
    assert "  --> r.effspec:4:14\n" in run.err
    (folder / "config.json").write_text(config)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:3_000_000])
    run = effc("plan", "r.effspec")
    assert run.code == 5 and "error[damaged-weights]: m/model.safetensors is cut" in run.err


@pytest.mark.slow
def test_a_model_seen_for_the_first_time_is_compared_with_the_recipe_before_work(effc, write, tmp_path):
    shutil.copytree(zoo_folders_by_name()["tiny-llama"], tmp_path / "m")
    (tmp_path / "m" / "skeleton.json").unlink()
    path = write('  thin = prune.channels(on: "layer.*.mlp", keep: 75% of channels)', model='hf("./m")')
    fresh = ("--cache-dir", tmp_path / "fresh")
    assert "unseen-model" in effc("check", path, *fresh).err
    for verb in (("plan",), ("check", "--resolve"), ("check",)):
        run = effc(*verb, path, *fresh)
        assert run.code == 3 and "did you mean `layers.*.mlp`?" in run.err and "unseen" not in run.err


@pytest.mark.slow
def test_what_a_person_should_know_of_a_model_is_told_before_work(effc, write, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(zoo_folders_by_name()["tiny-llama"], tmp_path / "half")
    weights = {n: t.to(torch.float16) for n, t in load_file(tmp_path / "half" / "model.safetensors").items()}
    save_file(weights, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    run = effc("plan", write(model='hf("./half")'))
    assert run.code == 0
    assert (
        'warning[model-remark]: hf("./half"): float16 is kept as stored and computes several times slower than float32'
        in run.err
    )
    assert run.err.count("float16 is kept") == 1 and "float16 is kept" not in run.out


def test_offline_holds_for_the_libraries_too():
    code = (
        "from effc.compiler.cli.main import main; main(['passes', '--offline']); "
        "from huggingface_hub import constants; print(constants.is_offline_mode())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "True", done.stderr


@pytest.mark.slow
def test_compile_does_what_the_plan_says(effc, write):
    path = write()
    assert effc("plan", path, "-o", "p.json").code == 0
    run = effc("compile", path, "--plan", "p.json", "-q")
    assert (run.code, run.err) == (0, "") and run.out.startswith("small -> out/small  hf, ")


def test_compile_refuses_what_the_plan_does_not_say(effc, write, tmp_path):
    path = write()
    assert effc("plan", path, "-o", "p.json").code == 0
    write("  thin = prune.channels(keep: 50% of channels, align: 32)")
    run = effc("compile", path, "--plan", "p.json")
    assert run.code == 3 and "error[plan-drift]" in run.err and not (tmp_path / "out").exists()
    assert effc("compile", path, "--plan", "none.json").code == 2


@pytest.mark.slow
def test_test_measures_again_in_every_format(effc, compiled):
    folder, _ = compiled
    artifact = folder / "out" / "small"
    run = effc("test", artifact, "--no-progress")
    assert run.code == 4 and run.err.endswith("missed: 1 bound kept, 1 missed\n")
    assert "  ok         params <= 0.9 * base" in run.out and "  missed     perplexity(data: heldout)" in run.out
    assert "r.effspec:13:3" in run.err
    body = json.loads(effc("test", artifact, "--format", "json", "-q").out)
    assert [b["state"] for b in body["artifacts"][0]["bounds"]] == ["ok", "missed"] and body["exit"] == 4


@pytest.mark.slow
def test_test_reports_to_ci(effc, compiled):
    folder, _ = compiled
    recipe, out = folder / "r.effspec", folder / "out"
    suite = ElementTree.fromstring(effc("test", recipe, "-o", out, "--format", "junit", "-q").out)
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert suite.find(".//failure/..").get("line") == "13"
    table = effc("test", recipe, "-o", out, "--format", "md", "-q").out
    assert "| bound | measured | limit | |\n|---|---|---|---|" in table and "**missed" in table
    assert "::error file=" in effc("test", recipe, "-o", out, "--format", "github", "-q").out


def test_a_recipe_without_artifacts_is_sent_to_compile(effc, write):
    run = effc("test", write())
    assert run.code == 2 and "effc compile r.effspec" in run.err


def test_diff_of_an_artifact_with_itself_says_so(effc, compiled):
    artifact = compiled[0] / "out" / "small"
    run = effc("diff", artifact, artifact)
    assert run.code == 0 and run.out == f"{artifact} and {artifact} say the same of themselves\n"
    assert effc("diff", artifact, "nowhere").code == 5


@pytest.mark.slow
def test_inspect_draws_what_is_left(effc, compiled):
    artifact = compiled[0] / "out" / "small"
    forms = [f for f in artifact.iterdir() if (f / "config.json").is_file()]
    assert forms
    for place in (artifact, *forms):
        assert "288 channels" in effc("inspect", place).out


@pytest.mark.slow
def test_inspect_reads_the_zoo_recipes_and_layers(effc, write):
    assert "8 heads of 16 in 4 KV groups" in effc("inspect", "zoo:tiny-llama").out
    assert "384 channels" in effc("inspect", write()).out
    assert effc("inspect", "zoo:tiny-llama", "--graph", "0").out.startswith("model.layers.0(hidden_states")
    assert effc("inspect", "zoo:tiny-llama", "--graph", "7", "--format", "dot").out.startswith("digraph")
    assert json.loads(effc("inspect", "zoo:tiny-llama", "--format", "json").out)["models"][0]["skeleton"]["units"]
    for odd in ("--graph=--5", "--graph=²"):
        assert "error[unknown-layer]" in effc("inspect", "zoo:tiny-llama", odd).err
    unknown = effc("inspect", "zoo:tiny-llama", "--graph", "mlp")
    assert unknown.code == 2 and "it has 8: model.layers.0 … model.layers.7" in unknown.err


def test_run_answers_a_prompt_and_a_pipe_alike(effc, compiled):
    artifact = compiled[0] / "out" / "small"
    asked = effc("run", artifact, "-p", "Once upon a time", "-n", 8)
    piped = effc("run", artifact, "-n", 8, stdin="Once upon a time\n")
    assert (asked.code, asked.err) == (0, "") and asked.out == piped.out and asked.out.endswith("\n")
    body = json.loads(effc("run", artifact, "-p", "Once upon a time", "-n", 8, "--format", "json").out)
    assert body["text"] + "\n" == asked.out and body["new_tokens"] <= 8


@pytest.mark.slow
def test_run_draws_the_same_answer_from_the_same_seed(effc):
    ask = ("run", "zoo:tiny-llama", "-p", "And", "-n", 12, "--temperature", 1.5)
    assert effc(*ask, "--seed", 3).out == effc(*ask, "--seed", 3).out
    assert len({effc(*ask, "--seed", seed).out for seed in range(4)}) > 1


def test_a_place_without_a_model_is_exit_2(effc, tmp_path):
    for verb in ("run", "inspect"):
        run = effc(verb, "nowhere")
        assert run.code == 2 and run.err.startswith("error[unknown-place]: there is no `nowhere`\n")
    assert "the zoo has no `big`" in effc("run", "zoo:big").err


def test_a_prompt_longer_than_the_model_is_refused(effc):
    run = effc("run", "zoo:tiny-llama", stdin="word " * 5000)
    assert run.code == 2 and "error[prompt-too-long]" in run.err


def test_the_cache_lists_explains_verifies_and_frees(effc, compiled):
    cache = ("--cache-dir", compiled[0] / "cache")
    listed = effc("cache", "ls", *cache)
    assert "prune.channels(keep: 75% of channels)" in listed.out
    assert "kept" in effc("cache", "why", compiled[0] / "r.effspec", *cache).out
    assert effc("cache", "verify", *cache).out.startswith("ok: ")
    assert effc("cache", "gc", "--older-than", 1, *cache).out.startswith("freed ")


@pytest.mark.slow
def test_a_damaged_cache_is_found_and_mended(effc, write, tmp_path):
    cache = ("--cache-dir", tmp_path / "cache")
    assert effc("compile", write(), *cache, "-q").code == 0
    blob = next((tmp_path / "cache" / "blobs").glob("*/*"))
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(bytes(data))
    found = effc("cache", "verify", *cache)
    assert found.code == 5 and str(blob) in found.err
    assert effc("cache", "verify", "--delete", *cache).code == 0 and not blob.exists()


def test_doctor_names_the_level_of_the_kernels_and_why_not_a_higher_one(effc, monkeypatch):
    monkeypatch.delenv("EFFC_ISA", raising=False)
    assert "kernels" in effc("doctor").out and "compiled, level " in effc("doctor").out
    monkeypatch.setenv("EFFC_ISA", "portable")
    assert "compiled, level portable, as EFFC_ISA says; the highest here is " in effc("doctor").out


def test_an_isa_that_is_not_here_is_refused_by_doctor_and_by_compile(effc, write, monkeypatch):
    monkeypatch.setenv("EFFC_ISA", "avx1024")
    doctor = effc("doctor")
    assert doctor.code == 5 and "EFFC_ISA is avx1024, and the levels are portable, avx2, avx512" in doctor.out
    compiled = effc("compile", write(), "-o", "out")
    assert compiled.code == 5 and "error[no-such-isa]" in compiled.err and "unset EFFC_ISA" in compiled.err


def test_doctor_finds_everything_that_is_required(effc):
    run = effc("doctor")
    assert run.code == 0 and "ok       torch" in run.out and "missing" not in run.out.split()
    body = json.loads(effc("doctor", "--format", "json").out)
    assert {"python", "torch", "transformers", "cache", "disk"} <= {f["topic"] for f in body["findings"]}

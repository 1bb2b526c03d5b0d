"""`effc lock` writes down what decides an artifact; `--locked` refuses what is otherwise, at its place."""

import os
import shutil
import tomllib
from pathlib import Path

import pytest
from effc.compiler.artifacts.artifact import artifact_hash
from effc.compiler.cli.main import main
from effc.compiler.core.sealed_json import canonical_json
from effc.compiler.inputs.sources.zoo import zoo_folders_by_name
from effc.compiler.plugin import lockfile

RECIPE = """effspec 1
model base = hf("./model")
data calib = text("calib.txt", samples: 2, length: 32, seed: 7)

pipeline small(base) {
  thin = prune.channels(keep: 75% of channels, align: 32, data: calib)
}

emit small { pruning_config("cut") }
"""


def world(folder: Path) -> Path:
    """A recipe with a model and data of its own."""
    folder.mkdir(exist_ok=True)
    model = zoo_folders_by_name()["tiny-llama"]
    (folder / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        shutil.copy(model / name, folder / "model" / name)
    shutil.copy(model / "calib.txt", folder / "calib.txt")
    (folder / "r.effspec").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    folder = world(tmp_path_factory.mktemp("locked") / "one")
    assert main(["lock", str(folder / "r.effspec"), "-q", "--cache-dir", str(folder / "cache")]) == 0
    return folder


@pytest.fixture
def own(locked, tmp_path):
    shutil.copytree(locked, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("cache"))
    return tmp_path


def test_a_lock_says_what_a_person_would_look_for(locked):
    lock = tomllib.loads((locked / "effspec.lock").read_text())
    facts = lock["recipes"]["r.effspec"]
    for name in ("machine isa", "version torch", "setting seed", "model base file model.safetensors"):
        assert facts[name]
    assert len(facts["data calib content"]) == 64 and len(facts["source pass prune.channels"]) == 64
    assert facts["model base dtype"] == "auto"  # a default that nobody wrote
    assert facts["data calib length"] == 32 and facts["step small.thin keep"]["Ratio"]["value"] == 0.75
    assert list(facts) == sorted(facts)


def test_a_plan_of_what_was_locked_passes_and_takes_the_locks_threads(effc, own):
    assert effc("plan", "r.effspec", "--locked", "-q").code == 0
    text = (own / "effspec.lock").read_text()
    (own / "effspec.lock").write_text(text.replace('"setting threads" = "1"', '"setting threads" = "2"'))
    assert effc("plan", "r.effspec", "--locked", "-q").code == 0
    assert effc("plan", "r.effspec", "--locked", "--threads", "1", "-q").code == 3


def test_a_lock_of_json_texts_as_effc_0_2_0_wrote_them_holds(effc, own):
    lock = lockfile.read_package_lock(own)
    facts = lock["recipes"]["r.effspec"]
    arguments = [f"step small.thin {name}" for name in ("align", "data", "keep", "on", "reorder", "repair")]
    for name in (*arguments, "data calib length", "data calib path", "model base dtype"):
        facts[name] = facts[name] if facts[name] == "null" else canonical_json(facts[name])
    lockfile.write_package_lock(own, lock)
    assert '\\"' in (own / "effspec.lock").read_text()
    assert effc("plan", "r.effspec", "--locked", "-q").code == 0
    (own / "r.effspec").write_text((own / "r.effspec").read_text().replace("75%", "50%"))
    assert "`step small.thin keep` was 75% of channels" in effc("plan", "r.effspec", "--locked", "-q").err


@pytest.mark.parametrize(
    ("file", "old", "new", "said", "line"),
    [
        ("calib.txt", "the", "thy", "`data calib content` was", 3),
        ("r.effspec", "75%", "50%", "`step small.thin keep` was", 6),
        ("r.effspec", "seed: 7", "seed: 8", "`data calib seed` was", 3),
        ("model/tokenizer_config.json", "{", "{ ", "`model base file tokenizer_config.json` was", 2),
        ("effspec.lock", '"version torch" = "', '"version torch" = "0', "`version torch` was 0", 6),
    ],
)
def test_drift_fails_with_its_place(effc, own, file, old, new, said, line):
    text = (own / file).read_text()
    assert old in text
    (own / file).write_text(text.replace(old, new, 1))
    run = effc("compile", "r.effspec", "--locked", "-q")
    assert run.code == 3 and "error[lock-drift]" in run.err and said in run.err
    assert f"r.effspec:{line}:" in run.err and not (own / "out").exists()


def test_a_lock_that_has_more_than_the_recipe_contradicts_it(effc, own):
    with open(own / "effspec.lock", "a") as file:
        file.write('"step small.gone" = "prune.blocks"\n')
    run = effc("plan", "r.effspec", "--locked", "-q")
    assert run.code == 3 and "`step small.gone` is in the lock and not in the recipe" in run.err


@pytest.mark.parametrize(
    "text",
    [
        "x = [",
        "format = 2\n",
        "format = 1\nrecipes = 3\n",
        "format = 1\n[packages.a]\nb = 1\n",
        "format = 1\n[recipes.a]\nb = nan\n",
    ],
)
def test_what_is_no_lock_is_refused(effc, own, text):
    (own / "effspec.lock").write_text(text)
    run = effc("plan", "r.effspec", "--locked", "-q")
    assert run.code == 2 and "error[broken-lock]" in run.err


def test_without_a_lock_there_is_nothing_to_hold_to(effc, own):
    (own / "effspec.lock").unlink()
    run = effc("plan", "r.effspec", "--locked", "-q")
    assert run.code == 2 and "error[no-lock]" in run.err and "effc lock r.effspec" in run.err


@pytest.mark.heavy
def test_two_fresh_folders_with_one_lock_give_one_artifact(effc, locked, tmp_path, monkeypatch):
    hashes = []
    for name in ("here", "elsewhere"):
        folder = world(tmp_path / name)
        shutil.copy(locked / "effspec.lock", folder)
        monkeypatch.chdir(folder)
        run = effc("compile", "r.effspec", "--locked", "-q", "--cache-dir", folder / "cache")
        assert run.code == 0, run.err
        hashes.append(artifact_hash(folder / "out" / "cut"))
    assert hashes[0] == hashes[1] and os.listdir(tmp_path / "here") == os.listdir(tmp_path / "elsewhere")

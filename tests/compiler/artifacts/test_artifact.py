"""An artifact is there whole or not at all, and says when it is no longer what was written."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from effc.compiler.artifacts.artifact import artifact_hash
from effc.compiler.artifacts.card import _reopened_forms_section
from effc.compiler.artifacts.diff import diff_artifacts
from effc.compiler.artifacts.manifest import (
    NAME,
    Check,
    Expectation,
    Manifest,
    Measure,
    read_manifest,
    readable_json_bytes,
    verify_files,
)
from effc.dsl.syntax.diagnostics import EXITS
from hypothesis import given
from hypothesis import strategies as st

from tests.drafts import write_artifact
from tests.worlds import refused, slug, write_safetensors

MEASURES = (Measure("perplexity(heldout)", "", 8.0, 8.8, 1.1), Measure("bytes", "B", 4096.0, 2048.0, 0.5))


def build(folder: Path, seed: int = 0, count: int = 3, size: int = 1000) -> Manifest:
    """Some files that follow from the seed, and what a compile would say of them."""
    for i in range(count):
        place = folder / "model" / f"part-{i}.bin"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(random.Random(seed + i).randbytes(size))
    return Manifest(
        "hf",
        name="lean",
        effc="0.1.0",
        recipe={"text": "effspec 1\n", "params": {"keep": 0.8}},
        lock={"inputs": {'zoo("tiny")': "ab12"}},
        measures=MEASURES,
        run={"created": str(time.time())},
        steps=({"name": "thin", "word": "prune.channels", "changes": ["mlp 96 -> 64"]},),
    )


def whole(path: Path) -> bool:
    verify_files(path)
    return True


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_a_written_artifact_is_whole_and_says_what_it_holds(tmp_path):
    written = write_artifact(tmp_path / "out" / "lean", build=build)
    read = read_manifest(tmp_path / "out" / "lean")
    assert read == written and whole(tmp_path / "out" / "lean")
    assert set(read.files) == {f"model/part-{i}.bin" for i in range(3)} and read.bytes == 3000
    card = (tmp_path / "out" / "lean" / "README.md").read_text()
    assert "| `perplexity(heldout)` | 8 | 8.8 | 1.100 |" in card and "mlp 96 -> 64" in card
    assert leftovers(tmp_path / "out") == []


def test_the_hash_is_of_what_was_decided_not_of_what_was_measured(tmp_path):
    write_artifact(tmp_path / "a", build=build)
    slower = (Measure("decode.p50", "ms", 2.0, float("nan")),)
    later = {"created": "later"}
    write_artifact(tmp_path / "b", build=lambda folder: build(folder).with_measures(measures=slower, run=later))
    write_artifact(tmp_path / "c", build=lambda folder: build(folder, seed=1))
    assert artifact_hash(tmp_path / "a") == artifact_hash(tmp_path / "b") != artifact_hash(tmp_path / "c")
    assert read_manifest(tmp_path / "b").measures[0].compiled is None  # JSON has no nan


def test_the_card_shows_a_difference_beside_the_limit_that_it_was_held_against():
    checks = (Check("compact, 0: logits", 0.25, 0.5), Check("compact, 1: logits", 0.2, 0.24))
    assert "| `compact` | 2 | 0.2 | 0.24 |" in _reopened_forms_section(checks)


def test_the_card_may_be_edited(tmp_path):
    write_artifact(tmp_path / "a", build=build)
    (tmp_path / "a" / "README.md").write_text("mine")
    assert whole(tmp_path / "a")


names = st.text(
    st.characters(codec="utf-8", exclude_characters="\\/", exclude_categories=("Cc", "Zl", "Zp")),
    min_size=1,
    max_size=8,
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | names | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


@given(
    recipe=st.dictionaries(names, plain, max_size=3),
    edits=plain,
    notes=st.lists(names, max_size=2),
    files=st.dictionaries(names.filter(lambda n: n not in (".", "..")), st.integers(0, 10**12), max_size=3),
)
def test_a_manifest_survives_json(recipe, edits, notes, files):
    manifest = Manifest(
        "hf",
        recipe=recipe,
        edits=edits,
        notes=tuple(notes),
        files={name: (size, "0" * 64) for name, size in files.items()},
        measures=MEASURES,
        expectations=(Expectation("params <= 2", 1.0, "2", "holds", 4),),
        checks=(Check("logits", 0.0, 1e-5),),
    )
    data = json.loads(readable_json_bytes(manifest.to_json()))
    measured = json.loads(readable_json_bytes(manifest.measures_json()))
    assert Manifest.from_json(data, measured) == manifest


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda a: (a / "model/part-1.bin").write_bytes(b"x" * 1000), "has other content"),
        (lambda a: os.truncate(a / "model/part-1.bin", 999), "has 999 bytes, the manifest records 1000"),
        (lambda a: (a / "model/part-1.bin").unlink(), "is missing"),
        (lambda a: (a / "model/extra.py").write_text("evil"), "is not in the manifest"),
    ],
)
def test_another_file_than_was_written_is_refused(tmp_path, spoil, said):
    write_artifact(tmp_path / "a", build=build)
    spoil(tmp_path / "a")
    (found,) = refused(lambda: verify_files(tmp_path / "a")).diagnostics
    assert found.slug == "artifact-edited" and said in found.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"format": 1', "artifact-broken"),
        ("[]", "artifact-broken"),
        ('{"format": true}', "artifact-broken"),
        ('{"format": 1}', "artifact-broken"),
        ('{"format": 2}', "artifact-newer"),
        ("\xff", "artifact-broken"),
        ("[" * 100_000, "artifact-broken"),
    ],
)
def test_a_manifest_that_no_effc_of_this_version_wrote_is_refused(tmp_path, text, expected):
    (tmp_path / NAME).write_bytes(text.encode("latin-1"))
    assert slug(lambda: read_manifest(tmp_path)) == expected


@pytest.mark.parametrize("change", [{"measures": [1]}, {"machine": []}, {"checks": [{"what": 1}]}, {"run": "long"}])
def test_a_fault_among_measures_is_told_of_their_file(tmp_path, change):
    write_artifact(tmp_path / "a", build=build)
    body = json.loads((tmp_path / "a" / "measures.json").read_text())
    (tmp_path / "a" / "measures.json").write_text(json.dumps(body | change))
    (found,) = refused(lambda: read_manifest(tmp_path / "a")).diagnostics
    assert found.slug == "artifact-broken" and str(tmp_path / "a" / "measures.json") in found.message


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "a\\..\\b", ""])
def test_a_manifest_can_not_name_files_outside_its_folder(tmp_path, name):
    write_artifact(tmp_path / "a", build=build)
    body = json.loads((tmp_path / "a" / NAME).read_text())
    body["files"] = {name: [1, "0" * 64]}
    (tmp_path / "a" / NAME).write_text(json.dumps(body))
    assert slug(lambda: read_manifest(tmp_path / "a")) == "artifact-broken"


def test_a_folder_without_manifest_is_no_artifact(tmp_path):
    assert slug(lambda: read_manifest(tmp_path)) == "no-artifact"
    assert slug(lambda: read_manifest(tmp_path / "nowhere")) == "no-artifact"


def test_what_is_there_stays_unless_force_is_given(tmp_path):
    write_artifact(tmp_path / "a", build=build)
    before = artifact_hash(tmp_path / "a")
    reject = refused(lambda: write_artifact(tmp_path / "a", build=lambda f: build(f, seed=9)))
    assert reject.diagnostics[0].slug == "output-exists" and reject.exit == EXITS["usage"]
    assert artifact_hash(tmp_path / "a") == before
    write_artifact(tmp_path / "a", build=lambda f: build(f, seed=9), force=True)
    assert artifact_hash(tmp_path / "a") != before and whole(tmp_path / "a") and leftovers(tmp_path) == []


def test_force_replaces_artifacts_only(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    assert slug(lambda: write_artifact(tmp_path / "home", build=build, force=True)) == "output-exists"
    (tmp_path / "link").symlink_to(tmp_path / "home")
    assert slug(lambda: write_artifact(tmp_path / "link", build=build, force=True)) == "output-exists"
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_filled_by_force(tmp_path):
    (tmp_path / "a").mkdir()
    write_artifact(tmp_path / "a", build=build, force=True)
    assert whole(tmp_path / "a")


def test_a_build_that_fails_leaves_the_old_artifact_and_nothing_else(tmp_path):
    write_artifact(tmp_path / "a", build=build)

    def breaks(folder: Path) -> Manifest:
        build(folder, seed=5)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_artifact(tmp_path / "a", build=breaks, force=True)
    assert whole(tmp_path / "a") and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_build_that_fails_leaves_no_folders_that_it_made(tmp_path):
    (tmp_path / "there").mkdir()

    def breaks(folder: Path) -> Manifest:
        raise KeyboardInterrupt

    for place in ("out/deep/a", "there/deep/a"):
        with pytest.raises(KeyboardInterrupt):
            write_artifact(tmp_path / place, build=breaks)
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]


def test_a_place_that_can_not_be_written_is_an_environment_matter(tmp_path):
    (tmp_path / "file").write_text("in the way")  # holds for root, too
    reject = refused(lambda: write_artifact(tmp_path / "file" / "out" / "a", build=build))
    assert reject.diagnostics[0].slug == "output-unwritable" and reject.exit == EXITS["environment"]


FULL = """
import resource, signal, sys
from pathlib import Path
from tests.drafts import write_artifact
from effc.dsl.syntax.diagnostics import Reject
from tests.compiler.artifacts.test_artifact import build
if sys.argv[2] != "0":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    write_artifact(Path(sys.argv[1]), build=lambda folder: build(folder, size=300_000), force=True)
except Reject as reject:
    print(reject.diagnostics[0].slug, reject.exit)
"""


def test_a_full_disk_leaves_the_old_artifact(tmp_path):
    write_artifact(tmp_path / "a", build=build)
    before = artifact_hash(tmp_path / "a")
    done = run(FULL, tmp_path / "a", 200_000)
    assert done.stdout.split() == ["disk-full", str(EXITS["resources"])], done.stderr
    assert artifact_hash(tmp_path / "a") == before and whole(tmp_path / "a") and leftovers(tmp_path) == []


@contextmanager
def small_disk(folder: Path):
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_file_system_is_told_with_what_is_free(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        done = run(FULL, disk / "a", 0)
        assert done.stdout.split() == ["disk-full", str(EXITS["resources"])], done.stderr
        assert list(disk.iterdir()) == []


def run(program: str, *args) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[3]
    return subprocess.run([sys.executable, "-c", program, *map(str, args)], cwd=root, capture_output=True, text=True)


def killed_at(delay: float, path: Path, seed: int) -> None:
    """Write in a process that is killed after so many seconds."""
    process = os.fork()
    if process == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        write_artifact(path, build=lambda f: build(f, seed, count=12), force=True)
        os._exit(0)
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


@pytest.mark.parametrize("turns", [10, pytest.param(30, marks=pytest.mark.heavy)])
@pytest.mark.slow
def test_killed_at_any_moment_the_artifact_is_the_old_or_the_new_one(tmp_path, turns):
    started = time.monotonic()
    write_artifact(tmp_path / "a", build=lambda f: build(f, 0, count=12))
    once = time.monotonic() - started
    known = {artifact_hash(tmp_path / "a")}
    write_artifact(tmp_path / "other" / "a", build=lambda f: build(f, 100, count=12))
    known.add(artifact_hash(tmp_path / "other" / "a"))
    for turn in range(turns):
        killed_at(once * 1.3 * turn / turns, tmp_path / "a", seed=100)
        assert artifact_hash(tmp_path / "a") in known and whole(tmp_path / "a")
    write_artifact(tmp_path / "a", build=build, force=True)
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_killed_at_any_moment_a_new_artifact_is_whole_or_absent(tmp_path):
    for turn in range(20):
        place = tmp_path / f"a{turn}"
        killed_at(0.002 * turn, place, seed=turn)
        assert not place.exists() or whole(place)
        for draft in tmp_path.glob(".a*"):
            if (draft / "manifest.json").is_file():  # killed behind the last write, before the rename
                assert whole(draft)
            else:
                assert slug(lambda d=draft: verify_files(d)) == "no-artifact"
    write_artifact(tmp_path / "last", build=build)
    assert leftovers(tmp_path) == []


def test_a_draft_of_a_living_process_is_left_alone(tmp_path):
    def meanwhile(folder: Path) -> Manifest:
        write_artifact(tmp_path / "b", build=build)
        assert folder.is_dir()
        return build(folder)

    write_artifact(tmp_path / "a", build=meanwhile)
    assert whole(tmp_path / "a") and whole(tmp_path / "b")


def test_diff_tells_shapes_measures_and_recipe(tmp_path):
    def shaped(rows: int, text: str):
        def make(folder: Path) -> Manifest:
            (folder / "model").mkdir()
            write_safetensors(
                folder / "model/model.safetensors",
                {"w": {"dtype": "F32", "shape": [rows, 2], "data_offsets": [0, rows * 8]}},
                bytes(rows * 8),
            )
            return Manifest("hf", recipe={"text": text}, measures=(Measure("params", "", 20, rows * 2),))

        return make

    write_artifact(tmp_path / "a", build=shaped(10, "keep: 100%\n"))
    write_artifact(tmp_path / "b", build=shaped(8, "keep: 80%\n"))
    found = diff_artifacts(tmp_path / "a", tmp_path / "b")
    assert ("shape", "w", (10, 2), (8, 2)) in [(r.part, r.what, r.a, r.b) for r in found.rows]
    assert ("measure", "params", 20, 16) in [(r.part, r.what, r.a, r.b) for r in found.rows]
    assert "-keep: 100%" in found.recipe and "10 x 2 -> 8 x 2" in found.to_text()
    names = [r.what for r in found.rows]
    assert "bytes on disk" in names and "bytes" not in names  # `bytes` is a metric, of weights alone
    assert diff_artifacts(tmp_path / "a", tmp_path / "a").rows == ()


@pytest.mark.slow
def test_a_diff_counts_what_packed_weights_stand_for_and_else_says_that_it_does_not_know(tmp_path):
    def packed(measures):
        def make(folder):
            (folder / "compact").mkdir()
            slot = {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}
            write_safetensors(folder / "compact/model.safetensors", {"w.packed": slot}, bytes(64))
            return Manifest("hf", measures=measures)

        return make

    write_artifact(tmp_path / "told", build=packed((Measure("params", "", 20, 16.0),)))
    write_artifact(tmp_path / "untold", build=packed(()))
    write_artifact(
        tmp_path / "native", build=lambda folder: Manifest("native", measures=(Measure("params", "", 20, 12.0),))
    )

    def params(a, b):
        return [
            (r.a, r.b)
            for r in diff_artifacts(tmp_path / a, tmp_path / b).rows
            if (r.part, r.what) == ("size", "params")
        ]

    assert params("told", "native") == [(16, 12)] and params("told", "untold") == [(16, "not known")]
    shapes = [(r.a, r.b) for r in diff_artifacts(tmp_path / "told", tmp_path / "native").rows if r.part == "shape"]
    assert shapes == [("1 tensors of `hf`", "held by `native` in a way of its own")]


def test_manifests_fingerprints_and_diffs_need_no_torch():
    done = run(
        "import sys\nfrom effc.compiler.core import fingerprint\nfrom effc.compiler.artifacts import artifact, card, diff, manifest\n"
        "facts = fingerprint.machine_facts()\nassert facts['cpu'] and facts['cpus'] >= 1, facts\n"
        "print('torch' in sys.modules)"
    )
    assert done.stdout.strip() == "False", done.stderr

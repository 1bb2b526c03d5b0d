"""A package, a disk or memory that is missing is named, and nothing half written stays."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compiler.cli.verbs.conftest import SCRIPT
from tests.compiler.cli.verbs.conftest import SMALL as RECIPE
from tests.grids import wide

pytestmark = pytest.mark.slow

WITHOUT = """
import importlib.metadata as metadata, os
from importlib.machinery import PathFinder
gone, found, version = os.environ["WITHOUT"], PathFinder.find_spec, metadata.version

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] == gone else found(name, path, target)

def asked(name):
    if name == gone:
        raise metadata.PackageNotFoundError(name)
    return version(name)

PathFinder.find_spec, metadata.version = find_spec, asked
"""


@pytest.fixture
def without(process, here, tmp_path_factory):
    """Run in a process that has one package less."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(WITHOUT)
    return lambda package, *args: process(*args, cwd=here, WITHOUT=package, PYTHONPATH=str(site))


def test_an_optional_package_that_is_missing_is_named_with_its_group(without, here):
    (here / "r.effspec").write_text(RECIPE.replace('hf("./model")', 'gguf("model.gguf")'))
    run = without("gguf", "plan", "r.effspec")
    assert (run.code, run.out) == (5, "")
    assert run.err.startswith("error[package-missing]: model source gguf needs gguf, not installed here\n")
    assert "  --> r.effspec:2:14" in run.err and 'help: pip install "effc[gguf]"' in run.err


def test_a_required_package_that_is_missing_is_named_before_work(without):
    run = without("platformdirs", "compile", "r.effspec")
    assert (run.code, run.out) == (5, "")
    assert run.err.startswith("error[package-missing]: platformdirs is not installed, effc needs platformdirs>=")
    assert 'help: pip install "platformdirs' in run.err


def in_small_disk(here: Path, size: str, *args: str) -> subprocess.CompletedProcess:
    """Run with a disk of that size on `small/`; skips where a user may not mount one."""
    (here / "small").mkdir()
    mount = "mount -t tmpfs -o size={} tmpfs small"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount.format("1m")], cwd=here, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    command = f'{mount.format(size)} && "$0" -c "$1" {" ".join(args)}; code=$?; find small -type f; exit $code'
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, sys.executable, SCRIPT],
        cwd=here,
        capture_output=True,
        text=True,
        env={**os.environ},
    )


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare here")
@pytest.mark.parametrize(
    ("where", "disk", "slug"),
    wide([("--cache-dir", "80k", "no-space"), ("-o", "48k", "too-large")], {("--cache-dir", "80k", "no-space")}),
)
def test_a_disk_that_fills_up_is_exit_6_and_holds_nothing_half_written(here, where, disk, slug):
    for file in here.rglob("*"):  # a cache stores hashes of files that are older than seconds: they take room, too
        os.utime(file, (0, 10**9))
    run = in_small_disk(here, disk, "compile", "r.effspec", "--no-progress", where, "small/x")
    assert run.returncode == 6, run.stderr
    assert f"error[{slug}]: " in run.stderr and "Traceback" not in run.stderr
    left = run.stdout.splitlines()
    assert not any(name.endswith("manifest.json") or "/steps/" in name for name in left), left


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare here")
def test_a_disk_without_room_for_a_file_that_was_named_is_not_the_caches(here):
    many = ", ".join(f"Smooth{number}QuantModifier: {{smoothing_strength: 0.8}}" for number in range(200))
    (here / "r.yaml").write_text(f"s: {{m: {{GPTQModifier: {{scheme: W4A16}}, {many}}}}}")
    run = in_small_disk(here, "4k", "import", "r.yaml", "-o", "small/r.effspec")
    assert run.returncode == 6 and not run.stdout, run.stderr
    assert run.stderr == (
        "error[no-space]: the disk is full at small/r.effspec\n"
        "help: make room on its disk, or name a file on another one\n"
    )


def test_a_memory_bound_that_is_passed_is_exit_6_and_leaves_no_artifact(effc, here):
    run = effc("compile", "r.effspec", "--no-progress", "--max-memory", "10MiB", "--cache-dir", "cache")
    assert (run.code, run.out) == (6, "")
    assert run.err.startswith("error[memory-bound]: ") and " are held, 10.0 MiB are allowed\n" in run.err
    assert "--> r.effspec:" in run.err and "raise --max-memory" in run.err
    assert not (here / "out").exists() and not any((here / "cache").rglob("steps/*"))

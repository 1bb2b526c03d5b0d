"""The extension for VS Code, packed by its own tool."""

import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[4] / "editors" / "vscode"
AWAY = re.compile(r"ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|EIDLETIMEOUT")


def npm(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["npm", *words], cwd=folder, capture_output=True, text=True, timeout=280)


@pytest.mark.heavy
@pytest.mark.skipif(not shutil.which("npm"), reason="npm is not installed")
def test_the_extension_is_packed_by_its_own_tool_with_all_that_it_starts_with(tmp_path):
    folder = tmp_path / "vscode"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("node_modules", "*.vsix"))
    got = npm(folder, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=1")
    if got.returncode and AWAY.search(got.stderr):
        pytest.skip("the registry of npm can't be reached")
    assert got.returncode == 0, got.stderr
    packed = npm(folder, "run", "package")
    assert packed.returncode == 0, packed.stdout + packed.stderr
    (file,) = folder.glob("*.vsix")
    with zipfile.ZipFile(file) as archive:
        inside = set(archive.namelist())
        about = json.loads(archive.read("extension/package.json"))
        colours = archive.read("extension/syntaxes/effspec.tmLanguage.json")
    assert colours == (FOLDER / "syntaxes" / "effspec.tmLanguage.json").read_bytes()
    named = [about["main"], *(x["path"] for x in about["contributes"]["grammars"])]
    named += [x["configuration"] for x in about["contributes"]["languages"]]
    assert {f"extension/{name.removeprefix('./')}" for name in named} <= inside
    for package in about["dependencies"]:
        assert f"extension/node_modules/{package}/package.json" in inside
    assert not any(name.endswith(".py") or "@vscode/vsce" in name for name in inside)  # tools stay behind

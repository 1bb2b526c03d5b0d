"""`effc(...)` runs a command line in this process, `process(...)` in one of its own."""

import io
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from effc.compiler.cli.main import main
from effc.compiler.inputs.sources.zoo import zoo_folders_by_name

from tests import worlds

SCRIPT = "import sys; from effc.compiler.cli.main import main; sys.exit(main())"
SMALL = """effspec 1
model base = hf("./model")
data  rows = text("rows.txt", samples: 4, length: 32)
pipeline small(base) {
  slim = prune.channels(keep: 50% of channels, align: 8, score: perplexity(rows))
}
emit small { hf("small", form: compact) }
"""
NAMES = ("NO_COLOR", "FORCE_COLOR", "CI", "EFFC_OFFLINE", "HF_HUB_OFFLINE")


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """One cache for all tests of this folder, none of the user's; no colours and no network from outside."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EFFC_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cli-cache"))


@pytest.fixture
def effc(capsys, monkeypatch, tmp_path):
    """Run in this process, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object, stdin: str = "") -> Run:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = main([str(a) for a in args])
        out, err = capsys.readouterr()
        return Run(code, out, err)

    return run


@pytest.fixture
def process(tmp_path):
    """Run as a user would: a fresh process, its output piped."""

    def run(*args: object, cwd: Path = tmp_path, timeout: float = 120, **env: str) -> Run:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *map(str, args)],
            cwd=cwd,
            timeout=timeout,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
        )
        return Run(done.returncode, done.stdout, done.stderr)

    return run


def recipe_text(steps: str, expect: str = "", model: str = 'zoo("tiny-llama")', name: str = "small") -> str:
    texts = zoo_folders_by_name()["tiny-llama"]
    sizes = {"calib": "samples: 2, length: 32", "heldout": "samples: 4, length: 64"}
    data = "\n".join(
        f'data {d} = text("{texts / d}.txt", {size}, seed: 7)' for d, size in sizes.items() if f"{d})" in steps + expect
    )
    return f'''effspec 1
"""A recipe of the tests."""

model base = {model}
{data}

pipeline {name}(base) {{
{steps}
}}

{expect}
emit {name} {{ hf("{name}") }}
'''


@pytest.fixture
def write(tmp_path):
    """Write a recipe into the test's folder; its path relative to that folder."""

    def put(
        steps: str = "  thin = prune.channels(keep: 75% of channels, align: 32)",
        expect: str = "",
        file: str = "r.effspec",
        **more: str,
    ) -> Path:
        (tmp_path / file).write_text(recipe_text(steps, expect, **more), encoding="utf-8")
        return Path(file)

    return put


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A recipe with one bound that holds and one that fails, compiled once by a real process, from an empty cache."""
    folder = tmp_path_factory.mktemp("compiled")
    expect = "expect small {\n  params <= 0.9 * base\n  perplexity(data: heldout) <= 0.5 * base\n}\n"
    steps = "  thin = prune.channels(keep: 75% of channels, align: 32)"
    (folder / "r.effspec").write_text(recipe_text(steps, expect), encoding="utf-8")
    env = {**os.environ, "EFFC_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "compile", "r.effspec", "--events", "events.jsonl"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    return folder, Run(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A folder with a small model, a text and a recipe of which there is nothing to say."""
    folder = tmp_path_factory.mktemp("sound")
    (folder / "model").mkdir()
    worlds.llama(folder / "model")
    worlds.tokenizer(folder / "model")
    (folder / "rows.txt").write_text("And it came to pass. " * 40)
    (folder / "r.effspec").write_text(SMALL)
    return folder


@pytest.fixture
def here(small_model, tmp_path):
    """A copy to damage."""
    shutil.copytree(small_model, tmp_path, dirs_exist_ok=True)
    return tmp_path

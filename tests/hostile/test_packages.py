"""Folders that are more than a model: what they say of paths, numbers and files is taken for what it may be alone."""

import json
import os
import shutil
import time

import pytest
from effc.compiler.apps.federation.declaration import read_declaration
from effc.compiler.apps.rttc.app import read_app
from effc.compiler.apps.rttc.knowledge import open_knowledge_base
from effc.compiler.apps.rttc.sample import read_samples
from effc.compiler.artifacts import reft
from effc.compiler.cli.main import main
from effc.compiler.inputs.windows import read_text
from effc.compiler.plugin import lockfile, recipe_packages
from effc.dsl.syntax.diagnostics import Reject

from tests.hostile import kinds
from tests.hostile.mutations import consistent
from tests.worlds import slug


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return kinds.honest(tmp_path_factory.mktemp("honest"))


@pytest.mark.parametrize(
    "change",
    [
        {"folder": "/etc"},
        {"folder": "../model"},
        {"clients": 10**9},
        {"clients": True},
        {"rounds": "7"},
        {"lr": float("inf")},
        {"strategy": "os.system"},
        {"trains": ["lora"]},
        {"ranks": [0]},
        {"data": [{"name": "x", "word": 3, "args": {}}]},
        {"full": 3},
    ],
    ids=str,
)
def test_a_federation_declares_what_it_may(honest, tmp_path, change):
    body = json.loads((honest / "flower" / "fedapp" / "federation.json").read_text())
    file = tmp_path / "federation.json"
    file.write_text(json.dumps(body))
    read_declaration(file)
    file.write_text(json.dumps(body | change))
    assert slug(lambda: read_declaration(file)) == "bad-federation"


@pytest.mark.parametrize("by", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("app.json", lambda f: read_app(f.parent)),
        ("knowledge.json", lambda f: open_knowledge_base(f.parent)),
        ("kb.jsonl", lambda f: list(read_samples(f))),
        ("rows.txt", read_text),
        ("reft.json", lambda f: reft.read_reft_base_and_edits(f.parent)),
        ("federation.json", read_declaration),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_pipes_and_devices_are_not_read(tmp_path, name, read, by):
    by(tmp_path / name)
    assert slug(lambda: read(tmp_path / name)) in ("odd-file", "broken-knowledge-base")


def test_a_model_that_breaks_is_not_effcs_fault(honest, tmp_path, capsys):
    """Listed operations, wired so that no shape fits: only computing shows it."""
    case = tmp_path / "compact"
    shutil.copytree(honest / "compact", case)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(honest / "stock" / "model" / name, case / "compact" / name)
    manifest = json.loads((case / "manifest.json").read_text())
    manifest["files"] |= {f"compact/{name}": [0, ""] for name in ("tokenizer.json", "tokenizer_config.json")}
    (case / "manifest.json").write_text(json.dumps(manifest))
    config = json.loads((case / "compact" / "config.json").read_text())
    for entry in config["effc"]["edits"]["graphs"].values():
        added = [node for node in entry["graph"]["nodes"] if node.get("target") == "operator.add"]
        added[-1]["target"] = "operator.matmul"
    (case / "compact" / "config.json").write_text(json.dumps(config))
    consistent(case)
    assert main(["verify", str(case)]) == 0
    for verb in (["inspect", str(case)], ["run", str(case), "--prompt", "a", "--max-new-tokens", "2"]):
        assert main([*verb, "--offline"]) == 5, capsys.readouterr().err
    assert "error[model-breaks]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["a." * 200_000 + "a = 1", '"\u2028".' * 100_000 + "a = 1", "[" + "a." * 200_000 + "a]", "a = " + "[" * 50_000],
)
def test_toml_that_takes_hours_is_refused_at_once(tmp_path, text):
    started = time.process_time()
    (tmp_path / recipe_packages.PACKAGE_FILE).write_text(text)
    (tmp_path / lockfile.NAME).write_text(text)
    for read in (recipe_packages.read_recipe_package, lockfile.read_package_lock):
        with pytest.raises(Reject, match="is no TOML that can be read"):
            read(tmp_path)
    assert time.process_time() - started < 5

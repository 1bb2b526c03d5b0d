"""What is kept of earlier queries belongs to what made it: identities are computed from content, never read."""

import hashlib
import json
import shutil
import tarfile

import pytest
from effc.compiler.apps.rttc.app import open_guided_client, read_app
from effc.compiler.apps.rttc.knowledge import open_knowledge_base
from effc.compiler.artifacts.load import load
from transformers import AutoTokenizer

from tests.hostile.kinds import STORED
from tests.hostile.mutations import consistent


@pytest.fixture
def app(tmp_path):
    with tarfile.open(STORED / "kinds.tar.xz") as archive:
        archive.extractall(tmp_path, [m for m in archive if m.name.startswith("kinds/rttc/")], filter="data")
    return tmp_path / "kinds" / "rttc"


def caches(folder, cache) -> set[str]:
    client = open_guided_client(read_app(folder), folder, load(folder, check="size"), words(folder), cache)
    return {client.lists.identity, client.states.identity}


def words(folder):
    return AutoTokenizer.from_pretrained(folder / "model")


def rewritten(file, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_base_of_other_content_does_not_pass_for_one_by_its_version(app, tmp_path):
    trusted = open_knowledge_base(app / "knowledge").version
    foreign = shutil.copytree(app, tmp_path / "foreign")
    rewritten(foreign / "knowledge" / "kb.json", version="0" * 16)
    assert open_knowledge_base(foreign / "knowledge").version == trusted
    samples = foreign / "knowledge" / "samples.jsonl"
    samples.write_text(samples.read_text().replace("it is", "is it"))
    files = json.loads((foreign / "knowledge" / "kb.json").read_text())["files"]
    files["samples.jsonl"] = hashlib.sha256(samples.read_bytes()).hexdigest()
    rewritten(foreign / "knowledge" / "kb.json", files=files, version=trusted)
    assert open_knowledge_base(foreign / "knowledge").version != trusted
    consistent(foreign)
    assert not caches(app, tmp_path / "cache") & caches(foreign, tmp_path / "cache")


@pytest.mark.parametrize("part", ["tokenizer", "config", "regime", "policy"])
def test_adapters_of_a_folder_that_differs_in_any_part_are_not_taken(app, tmp_path, part):
    foreign = shutil.copytree(app, tmp_path / "foreign")
    if part == "tokenizer":
        file = foreign / "model" / "tokenizer.json"
        file.write_text(file.read_text() + "\n")
    elif part == "config":
        rewritten(foreign / "model" / "config.json", rms_norm_eps=0.5)
    else:
        body = json.loads((foreign / "app.json").read_text())
        body["regime" if part == "regime" else "policy"] |= {"lr": 0.9} if part == "regime" else {"count": 6}
        rewritten(foreign / "app.json", **body)
    consistent(foreign)
    assert not caches(app, tmp_path / "cache") & caches(foreign, tmp_path / "cache")
    same = shutil.copytree(app, tmp_path / "same")
    assert caches(app, tmp_path / "cache") == caches(same, tmp_path / "cache")

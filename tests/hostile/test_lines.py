"""A name with a line end does not pass for a line of what a verb prints."""

import json
import shutil
import tarfile

import pytest
from effc.compiler.cli.main import main
from effc.compiler.cli.verbs.output import Screen
from effc.compiler.core.cache import Cache, canonical_json_sha256

from tests.hostile.kinds import STORED
from tests.hostile.mutations import consistent

FAKE = "x\nok: fake\u2028ok: fake\rok: fake"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    with tarfile.open(STORED / "kinds.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "kinds"


def named(body):
    body["name"] = FAKE


def stepped(body):
    body["steps"] = [{"name": FAKE, "word": FAKE, "summary": FAKE}]


def locked(body):
    body["lock"]["inputs"] = {FAKE: FAKE}


def noted(body):
    body["notes"] = [FAKE]


def parts(body):
    body["members"][0]["measures"][0][0] = FAKE


VERBS = ("verify", "inspect", "diff", "pick", "test", "report", "run", "sign")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("change", [named, stepped, locked, noted, parts], ids=lambda change: change.__name__)
def test_no_text_of_a_manifest_passes_for_a_line_of_a_verb(kinds, tmp_path, monkeypatch, capsys, verb, change):
    monkeypatch.chdir(tmp_path)
    case = tmp_path / "case"
    shutil.copytree(kinds / "front", case)
    body = json.loads((case / "manifest.json").read_text())
    change(body)
    (case / "manifest.json").write_text(json.dumps(body))
    consistent(case)
    words = {
        "diff": ["diff", kinds / "front", case],
        "pick": ["pick", case, "--params", "1"],
        "report": ["report", case, "-o", tmp_path / "page.html"],
        "run": ["run", case, "--prompt", "1", "--offline"],
        "sign": ["sign", case, "--key", tmp_path / "none"],
    }.get(verb, [verb, case])
    assert main([str(word) for word in words]) != 1
    out, err = capsys.readouterr()
    assert not any(line.startswith("ok: fake") for line in (out + "\n" + err).splitlines())


def test_a_step_of_a_cache_is_listed_on_a_line(tmp_path, capsys):
    cache, made_of = Cache(tmp_path / "cache"), {"step": {"word": FAKE}, "seed": 0}
    cache.write_step_record(
        canonical_json_sha256(made_of), made_of, {"tensors": {}, "borrowed": {}, "edits": {}, "notes": {}}
    )
    assert main(["cache", "ls", "--cache-dir", str(cache.folder)]) == 0
    out, err = capsys.readouterr()
    assert "x\N{REPLACEMENT CHARACTER}ok: fake" in out
    assert not any(line.startswith("ok: fake") for line in (out + err).splitlines())


def test_a_cell_of_a_table_is_on_a_line():
    assert len(Screen().table([("a", "b"), (FAKE, FAKE)]).splitlines()) == 2

"""Links that came beside an artifact are refused before the first write: nothing of the user's is written to."""

import json
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import pytest
from effc.compiler.apps.federation.deployment import _remove_deployment_files, start_deployment, stop_deployment
from effc.compiler.apps.federation.processes import start_process
from effc.compiler.core.cache import write_atomic
from effc.dsl.syntax.diagnostics import Reject

from tests.compiler.apps.federation.test_deployment import Declared, flower  # noqa: F401
from tests.compiler.cli.verbs.conftest import effc, own_cache  # noqa: F401
from tests.hostile.kinds import STORED

WRITTEN = {
    "status": (
        "fed-deployment",
        "fed-deployment/flower",
        "fed-deployment/flower/config.toml",
        "fed-deployment/superlink.log",
        "fed-deployment/keys",
        "fed-deployment/checkpoints/training.json",
        "fed-deployment/result",
        "fed-deployment/state.db",
    ),
    "run": (
        "fed-result",
        "fed-result/global",
        "fed-result/global/adapter_config.json",
        "fed-result/global/adapter_model.safetensors",
        "fed-result/federation-result.json",
    ),
}
CASES = [
    (verb, place)
    for verb, places in {**WRITTEN, "up": WRITTEN["status"], "down": WRITTEN["status"]}.items()
    for place in places
]


@pytest.fixture
def sent(tmp_path):
    """An artifact with a deployment and a result beside it, as one archive might bring them."""
    with tarfile.open(STORED / "kinds.tar.xz") as archive:
        archive.extractall(tmp_path, [m for m in archive if m.name.startswith("kinds/flower/")], filter="data")
    shutil.move(tmp_path / "kinds" / "flower", tmp_path / "fed")
    for folder in ("fed-deployment/flower", "fed-deployment/checkpoints", "fed-result/global"):
        (tmp_path / folder).mkdir(parents=True)
    log = str(tmp_path / "fed-deployment" / "superlink.log")
    process = {"name": "superlink", "pid": 4_000_000, "started": "1", "log": log}
    body = {"format": 1, "port": 9092, "run": "7", "processes": [process]}
    (tmp_path / "fed-deployment" / "deployment.json").write_text(json.dumps(body))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".bashrc").write_text("mine")
    return tmp_path


def words(verb: str, sent) -> list[str]:
    return ["run", str(sent / "fed")] if verb == "run" else ["federate", verb, str(sent / "fed")]


@pytest.mark.parametrize(("verb", "place"), CASES)
def test_a_link_beside_an_artifact_is_refused_before_the_first_write(effc, sent, verb, place):  # noqa: F811
    target = sent / "home" if "." not in place.rpartition("/")[2] else sent / "home" / ".bashrc"
    link = sent / place
    shutil.rmtree(link, ignore_errors=True)
    link.symlink_to(target)
    run = effc(*words(verb, sent))
    assert run.code == 5 and "error[odd-file]" in run.err and str(link) in run.err
    assert [f.name for f in (sent / "home").iterdir()] == [".bashrc"]
    assert (sent / "home" / ".bashrc").read_text() == "mine" and link.is_symlink()


@pytest.mark.parametrize(("verb", "place"), [("status", "fed-deployment/superlink.log"), ("run", "fed-result/one")])
def test_a_second_name_of_a_file_elsewhere_and_a_pipe_are_refused_as_links_are(effc, sent, verb, place):  # noqa: F811
    os.link(sent / "home" / ".bashrc", sent / place)
    assert "error[odd-file]" in effc(*words(verb, sent)).err
    (sent / place).unlink()
    os.mkfifo(sent / place)
    assert "error[odd-file]" in effc(*words(verb, sent)).err


def test_a_link_in_the_way_of_a_draft_is_not_written_through(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / f".a.json.{os.getpid()}").symlink_to(tmp_path / "mine")
    write_atomic(tmp_path / "a.json", b"{}")
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "a.json").read_bytes() == b"{}"
    assert not (tmp_path / "a.json").is_symlink()


def test_no_output_of_a_process_is_appended_through_a_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "one.log").symlink_to(tmp_path / "mine")
    with pytest.raises((Reject, OSError)):
        start_process("one", ["true"], os.environ, tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"


def test_no_app_key_or_database_that_came_beside_an_artifact_is_there_when_a_deployment_starts(flower, tmp_path):  # noqa: F811
    """Flower runs an app that its home has already under the hash of the one that it is sent, whatever it holds."""
    folder = tmp_path / "fed-deployment"
    apps = "flower/apps/effc.fed.0.0.0.00000000/fedapp/server_app.py"
    planted = [folder / f for f in (apps, "state.db/old", "state.db-wal", "keys/old")]
    for file in planted:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("evil")
    (folder / "checkpoints").mkdir()
    deployment = start_deployment(tmp_path / "fed", Declared, folder, tmp_path, (), tmp_path / "cache")
    left = [file for file in planted if file.exists()]
    stop_deployment(deployment)
    assert not left and (folder / "checkpoints").is_dir()


def test_apps_beside_an_artifact_that_cannot_be_removed_are_refused_and_not_run():
    child = os.fork()
    if not child:  # as nobody: root removes what may not be written, too
        outcome = 1
        try:
            if not os.getuid():
                os.setuid(65534)
            folder = Path(tempfile.mkdtemp())
            (folder / "flower" / "apps" / "evil").mkdir(parents=True)
            (folder / "flower" / "apps").chmod(0o555)
            try:
                _remove_deployment_files(folder)
            except Reject as refused:
                outcome = 0 if refused.diagnostics[0].slug == "odd-file" else 2
            (folder / "flower" / "apps").chmod(0o755)
            shutil.rmtree(folder)
        finally:
            os._exit(outcome)
    assert os.waitpid(child, 0)[1] == 0

"""Flower as it really behaves: what is bundled, what its ranges allow, who is blamed, and its simulation once.

Most of what Flower does unasked is met by a flag or a line of the app's page; each is looked for here by name.
"""

import json
import os
import subprocess
import sys
import threading
import time
import tomllib
import zipfile
from importlib.metadata import requires
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from effc.compiler.apps.federation import deployment
from effc.compiler.apps.federation.app import FLWR, make_readme
from effc.compiler.apps.federation.processes import (
    accepts_connections,
    free_ports,
    start_process,
    terminate_live_processes,
)

pytest.importorskip("flwr")
pytest.importorskip("peft")

from effc.compiler.apps.federation.flower import FlowerGrid, time_limit

from tests.compiler.apps.federation.test_flower_target import ADAPTERS, compiled, declared, run

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("engines"), "strategy: abm")


def test_the_bundle_has_the_app_and_no_weights(artifact):
    from flwr.cli.build import build_fab_from_disk

    bundle = build_fab_from_disk(artifact)
    names = set(zipfile.ZipFile(BytesIO(bundle)).namelist())
    assert {"pyproject.toml", "fedapp/server_app.py", "fedapp/client_app.py", "fedapp/federation.json"} <= names
    assert not [name for name in names if name.endswith((".safetensors", ".bin")) or name.startswith("model/")]
    assert len(bundle) < 10 * 10**6


def test_extras_install_beside_each_other():
    """flwr pins the web packages narrowly: what it wants has to lie within what we want."""
    from packaging.requirements import Requirement

    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ours["optional-dependencies"]
    told = [Requirement(r) for r in [*ours["dependencies"], *extras["serve"], *extras["fed"], *extras["ray"]]]
    wanted = {name: [r.specifier for r in told if r.name == name] for name in {r.name for r in told}}
    seen = []
    for theirs in (Requirement(r) for r in requires("flwr")):
        if theirs.name not in wanted or (theirs.marker and "simulation" not in str(theirs.marker)):
            continue
        both = [theirs.specifier, *wanted[theirs.name]]
        least = {c.version for specifier in both for c in specifier if c.operator in (">=", "==")}
        assert any(all(one.contains(version) for one in both) for version in least), f"{theirs.name}: {both}"
        seen.append(theirs.name)
    assert {"fastapi", "uvicorn", "typer", "rich", "ray", "cryptography"} <= set(seen)


@pytest.mark.parametrize(
    "line",
    [
        "FLWR_TELEMETRY_ENABLED=0",  # asks home
        "FLWR_DISABLE_UPDATE_CHECK=1",
        "RAY_USAGE_STATS_ENABLED=0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1",  # `uv sync` in every run
        "--disable-runtime-dependency-installation",
        f'"flwr[simulation]{FLWR}"',  # Flower's range is narrow
        "client-resources-num-cpus=1",  # two by default: on two cores one client at a time
        "num-supernodes=3",  # two by default
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT",  # a SuperLink that outlives the command, at a port of everybody's
        "export FLWR_HOME",
        "with `--stream` it exits 0 even if the run fails",
        "finished:completed",
        "reachable by nobody but nodes and you",  # the Control API is open
        "--host 127.0.0.1",
        "--database state.db",  # else a killed SuperLink loses its run
        "--isolation process",
        "--superexec-auth-secret-file secret",  # without it the executor ends with status 0
        "chmod 600 secret",
        "--enable-supernode-auth",
        "ssh-keygen -q -t ecdsa -b 384",  # Ed25519 is refused
        "subjectAltName=DNS:localhost,IP:127.0.0.1",
        "flwr supernode register",
        "--max-retries 5",  # else a wrong CA is tried for ever
        "Every node has its\nown `--port`",
        "A round takes five seconds at least",  # each message starts a process
        "can come back after a\nminute",  # its old heartbeat has to run out
        "A client that hangs is stopped",
    ],
)
def test_the_page_says_what_flower_needs_to_be_told(artifact, line):
    assert line in make_readme(declared(artifact), "fed")


def test_an_environment_of_a_deployment_asks_nobody_and_installs_nothing():
    assert deployment.QUIET["FLWR_TELEMETRY_ENABLED"] == "0" and deployment.QUIET["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert deployment.QUIET["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"


def test_a_client_that_hangs_is_stopped_and_one_that_answers_is_not():
    with pytest.raises(TimeoutError, match=r"stopped after 0\.2 s"), time_limit(0.2):
        while True:
            time.sleep(0.01)
    with time_limit(0.2):
        pass
    time.sleep(0.3)  # nothing comes later
    found = []

    def elsewhere():
        with time_limit(0.01):
            time.sleep(0.05)
        found.append("answered")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == ["answered"]  # a signal reaches the main thread alone


def test_a_reply_is_of_the_node_that_was_asked_whoever_sends_it():
    """The SuperLink, node 1, answers for a node that is gone; errors are told by their being there, not by code."""
    from effc.compiler.apps.federation.grid import Message
    from flwr.app import Error
    from flwr.app import Message as Letter
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    class Gone:
        def get_node_ids(self):
            return [70]

        def push_messages(self, letters):
            (self.letter,) = letters
            self.letter.metadata.__dict__["_message_id"] = "m"
            return ["m"]

        def pull_messages(self, ids):
            made = Letter(Error(code=0, reason="Traceback\n  File x\nNode Unavailable\n"), reply_to=self.letter)
            made.metadata.__dict__["_src_node_id"] = 1
            return [made]

    grid = FlowerGrid(Gone())
    (name,) = grid.push_messages([Message(70, "train", 1, {"own": {"w": np.zeros(2, np.float32)}}, {})])
    (reply,) = grid.pull_messages([name])
    assert (reply.node, reply.error) == (70, "Node Unavailable")


@pytest.mark.heavy
@pytest.mark.timeout(1500)
@pytest.mark.skipif(
    not find_spec("ray") and "EFFC_FLOWER" not in os.environ,
    reason='needs ray: `pip install "flwr[simulation]"`, here or in the environment EFFC_FLOWER',
)
@pytest.mark.parametrize(
    ("trained", "options"),
    [(ADAPTERS, "strategy: abm"), ("trains: full", "strategy: coverage, budgets: [100%, 80%, 60%], share: 67%")],
)
def test_the_same_app_runs_in_flowers_simulation_to_the_same_bits(trained, options, tmp_path):
    """With EFFC_FLOWER, an environment's `bin` that has flwr, Ray and effc, where this one lacks them."""
    bin_ = Path(os.environ.get("EFFC_FLOWER", Path(sys.executable).parent))
    from effc.compiler.apps.federation.results import write_results

    artifact = compiled(tmp_path, options, trained)
    (port,), model = free_ports(1), artifact / "model"
    env = {**os.environ, **deployment.QUIET, "FLWR_HOME": str(tmp_path / "flower"), "OMP_NUM_THREADS": "1"}
    env |= {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port), "EFFC_CACHE_DIR": str(tmp_path / "cache")}
    env["PATH"] = f"{bin_}{os.pathsep}{env['PATH']}"
    link = [str(bin_ / "flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    process = start_process("superlink", link, env, tmp_path)  # as `flwr run` would, which leaves it 15 s

    def flwr(*words):
        made = subprocess.run(
            [bin_ / "flwr", *words], env=env, cwd=artifact, capture_output=True, text=True, check=False
        )
        assert made.returncode == 0, made.stdout + made.stderr
        return json.loads(made.stdout)

    try:
        until = time.monotonic() + 120
        while not accepts_connections(port):
            assert time.monotonic() < until and process.is_alive, (tmp_path / "superlink.log").read_text()
            time.sleep(0.5)
        time.sleep(2)
        told = f"model='{model}' data='{artifact.parents[1]}' output='{tmp_path / 'result'}'"
        size = "num-supernodes=3 client-resources-num-cpus=1"
        made = flwr("run", ".", "--federation-config", size, "--run-config", told, "--format", "json")
        status = "pending"
        while not status.startswith("finished"):
            time.sleep(3)
            status = flwr("list", "--run-id", str(made["run-id"]), "--format", "json")["runs"][0]["status"]
        assert status == "finished:completed", (tmp_path / "superlink.log").read_text()[-3000:]
    finally:
        terminate_live_processes([process])
    whole = run(artifact, tmp_path / "simulated")
    write_results(whole.strategy.results(), whole.course, declared(artifact), tmp_path / "wanted")
    states = {
        folder: {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*.safetensors")}
        for folder in (tmp_path / "result", tmp_path / "wanted")
    }
    assert states[tmp_path / "result"] and states[tmp_path / "result"] == states[tmp_path / "wanted"]

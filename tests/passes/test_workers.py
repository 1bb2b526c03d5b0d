"""`--workers`: scores and measures that other processes compute, the same whoever did, and whoever died of it."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec

import pytest
import torch
from effc.compiler.core.cache import Cache
from effc.compiler.core.events import Said, Ticked
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.compiler.driver.pipeline import Build
from effc.compiler.driver.ray_workers import require_authenticated_ray_head
from effc.compiler.driver.worker_pool import make_transport, worker_team
from effc.compiler.driver.worker_transport import WorkerTransport
from effc.dsl.syntax.diagnostics import Reject

from tests import tiny

pytestmark = pytest.mark.slow


def needs_ray():
    """Skip where there is none; it is not imported, since Ray reads its environment once."""
    if not find_spec("ray"):
        pytest.skip("needs ray")


CUT = "prune.multi(remove: 12% of params, group: 16, score: perplexity(rows), data: rows)"
NET = "supernet.elastic(channels: [100%, 50%], heads: [100%, 50%], data: rows, steps: 0)"
MIN_SAMPLES = "search.hill(measure: [perplexity(rows), params], evals: 8)"


def written(tmp_path, *steps):
    config = tiny.config("llama").to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    path = tmp_path / "few.effspec"
    lines = "\n".join(f"  s{number} = {step}" for number, step in enumerate(steps))
    path.write_text(f"""effspec 1
model base = config("tiny.json", seed: 3)
data  rows = synthetic(6, length: 12, seed: 1)

pipeline lean(base) {{
{lines}
}}

emit lean {{ front("lean") }}
""")
    return path


class Deadly(WorkerTransport):
    """Other hands; of every step a worker dies of the first task that it is given, whatever the load of the machine.
    Of those that are `frozen` nobody hears any more instead."""

    def __init__(self, hands, frozen=False):
        self.hands, self.frozen, self.pids, self.killed = hands, frozen, {}, []

    size = property(lambda self: self.hands.size)

    def start_worker(self, place):
        self.hands.start_worker(place)

    def send(self, place, line):
        step = json.loads(line).get("step")
        if step is None or step["key"] in self.killed:
            self.hands.send(place, line)
            return
        os.kill(self.pids[place], signal.SIGSTOP)  # or it may have answered before it is killed
        self.hands.send(place, line)
        if not self.frozen:
            os.kill(self.pids[place], signal.SIGKILL)
        self.killed.append(step["key"])

    def receive(self, seconds):
        found = self.hands.receive(seconds)
        for place, text, alive in found:
            if alive and "pid" in (answer := json.loads(text)):
                self.pids[place] = answer["pid"]
        return found

    def stop_worker(self, place):
        self.hands.stop_worker(place)

    def is_stopped(self, place):
        return self.hands.is_stopped(place)

    def end(self):
        self.hands.end()


def stepped(recipe, cache, workers="", deadly=False, frozen=False):
    """What the cache keeps of every step, run by so many workers; what was told; the steps that a worker died in."""
    heard = []
    torch.set_num_threads(1)
    session = api.open_session(
        recipe, cache_dir=recipe.parent / cache, threads=1, workers=workers, on_event=heard.append
    )
    hands = make_transport(session.settings) if workers else None
    if deadly or frozen:
        hands = Deadly(hands, frozen)
    (plan,) = api.plan_all_pipelines(session)
    with worker_team(session, hands) as team:
        if frozen:
            team.timeouts.first = 2.0
        ctx, kept = session.context(plan.recipe, plan.pipeline), Cache(session.settings.cache_dir)
        build = Build(plan, ctx, kept, team=team)
        for stage in plan.stages:
            build.run_step_unless_cached(stage)
    return (
        [kept.read_complete_step(stage.key) for stage in plan.stages],
        heard,
        hands.killed if deadly or frozen else [],
    )


@pytest.mark.timeout(300)
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="this system doesn't tell who is stopped")
def test_a_worker_that_is_stopped_is_named_and_given_up_and_changes_nothing(tmp_path):
    recipe = written(tmp_path, NET, MIN_SAMPLES)
    alone, _, _ = stepped(recipe, "alone")
    shared, heard, frozen = stepped(recipe, "shared", 1, frozen=True)
    assert shared == alone and len(frozen) == 1
    said = [event.message for event in heard if isinstance(event, Said)]
    told = next(n for n, line in enumerate(said) if line.startswith("worker 1 has not answered for "))
    assert any("was lost (it did not answer for " in line and "is done again" in line for line in said[told:])


@pytest.mark.parametrize("steps", [(NET, MIN_SAMPLES), pytest.param((CUT, NET, MIN_SAMPLES), marks=pytest.mark.heavy)])
def test_workers_that_are_killed_change_nothing_of_cuts_and_fronts(tmp_path, steps):
    recipe = written(tmp_path, *steps)
    alone, _, _ = stepped(recipe, "alone")
    shared, heard, killed = stepped(recipe, "shared", 2, deadly=True)
    asking = len(steps) - 1  # the family is made without asking anybody
    assert shared == alone and len(killed) == asking
    said = [event.message for event in heard if isinstance(event, Said)]
    assert "2 workers of 1 thread each" in said
    assert sum("was lost (killed by SIGKILL): its task is done again" in line for line in said) == asking
    assert CUT not in steps or any(isinstance(e, Ticked) and "2 workers" in e.note for e in heard)


def test_a_worker_with_another_torch_is_refused_by_name(tmp_path, monkeypatch):
    other = tmp_path / "other" / "torch-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    monkeypatch.setenv("PYTHONPATH", str(other.parent))
    with pytest.raises(Reject, match="no-workers") as caught:
        stepped(written(tmp_path, CUT, NET, MIN_SAMPLES), "cache", 1)
    assert caught.value.exit == 5
    assert f"it has torch 9.9, and here is {metadata.version('torch')}" in caught.value.diagnostics[0].message


@pytest.mark.parametrize("word", ["0", "two", "ray:", "-1", "1.5", "ray2"])
def test_workers_that_are_none_are_refused(tmp_path, word):
    with pytest.raises(Reject, match="bad-option") as caught:
        make_transport(Settings(tmp_path, workers=word))
    assert caught.value.exit == 2


def answer(listening, words):
    """Say the same to everybody who comes, and keep the line."""
    lines = []
    with suppress(OSError):  # closed: the test is over
        while True:
            lines.append(listening.accept()[0])
            lines[-1].sendall(words)


@pytest.mark.parametrize("port", ["closed", "silent", b"HTTP/1.1 404 Not Found\r\n\r\n", bytes([0, 0, 0, 4, *[0] * 5])])
def test_an_address_where_no_cluster_is_is_refused_within_ten_seconds(tmp_path, port):
    needs_ray()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if port != "closed":
            listening.listen()
        if isinstance(port, bytes):  # the last are settings of HTTP/2, as of a server that isn't Ray's
            threading.Thread(target=answer, args=(listening, port), daemon=True).start()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(Reject, match="no-cluster") as caught:
            make_transport(Settings(tmp_path, workers=f"ray:{address}"))
        assert time.monotonic() - began < 10 and caught.value.exit == 8
    assert address in caught.value.diagnostics[0].message


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))


@pytest.fixture
def cluster(tmp_path_factory, token):
    """The address of a cluster of two nodes, each a group of processes of this machine, with one processor each."""
    yield from started(tmp_path_factory, nodes=2)


@pytest.fixture
def open_cluster(tmp_path_factory):
    """The address of a cluster of one node that asks for no token."""
    yield from started(tmp_path_factory, nodes=1)


def started(tmp_path_factory, nodes):
    needs_ray()
    command, env = (
        [sys.executable, "-m", "ray.scripts.scripts"],
        {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"},
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folder = tmp_path_factory.mktemp("r")
    common = ["--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats", "--block"]
    head = ["--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false", f"--temp-dir={folder}"]
    running = []
    for more in (head, [f"--address={address}"])[:nodes]:
        running.append(
            subprocess.Popen(
                [*command, "start", *common, *more],
                env=env,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )
        health = [*command, "health-check", "--address", address]
        while subprocess.run(health, env=env, capture_output=True).returncode:
            assert running[-1].poll() is None, "a node did not start"
            time.sleep(0.5)
    yield address
    for node in reversed(running):
        node.terminate()
        node.wait(30)


def test_a_cluster_that_asks_for_no_token_is_not_joined(tmp_path, open_cluster, monkeypatch):
    for mode in ("disabled", "token"):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
        with pytest.raises(Reject, match="open-cluster") as caught:
            make_transport(Settings(tmp_path, workers=f"ray:{open_cluster}"))
        assert caught.value.exit == 5 and "RAY_AUTH_MODE=token" in caught.value.diagnostics[0].help


def test_a_cluster_is_joined_with_its_token_alone(tmp_path, cluster, monkeypatch):
    require_authenticated_ray_head(cluster)
    for name, value in (("RAY_AUTH_TOKEN", "a" * 64), ("RAY_AUTH_MODE", "disabled")):
        monkeypatch.setenv(name, value)
        with pytest.raises(Reject, match="no-cluster"):
            make_transport(Settings(tmp_path, workers=f"ray:{cluster}"))


LEAF_FUNCTIONS = """
import json, os, sys
from pathlib import Path
from effc.compiler.driver.ray_workers import RayTransport

def listening():
    rows = [line.split() for n in ("tcp", "tcp6") for line in Path("/proc/net", n).read_text().splitlines()[1:]]
    return {row[9]: row[1].rpartition(":")[0] for row in rows if row[3] == "0A"}

before = listening()
actors = RayTransport("", 1)
assert actors.size
import ray
paths = ray.get(ray.remote(lambda: sys.path).remote())
heard = [address for inode, address in listening().items() if inode not in before]
print(json.dumps({"paths": paths, "heard": heard, "mode": os.environ["RAY_AUTH_MODE"]}))
actors.end()
assert "RAY_AUTH_TOKEN" not in os.environ
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_cluster_of_its_own_listens_at_loopback_and_imports_nothing_of_the_working_directory(tmp_path):
    needs_ray()
    (tmp_path / "torch.py").write_text("raise SystemExit('not ours')")
    done = subprocess.run(
        [sys.executable, "-P", "-c", LEAF_FUNCTIONS], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["mode"] == "token" and str(tmp_path) not in found["paths"]
    assert len(found["heard"]) > 3 and all(address.endswith("0100007F") for address in found["heard"])


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_on_two_nodes_of_ray_a_killed_worker_changes_nothing(tmp_path, cluster):
    recipe = written(tmp_path, CUT, NET, MIN_SAMPLES)
    alone, _, _ = stepped(recipe, "alone")
    shared, heard, killed = stepped(recipe, "shared", f"ray:{cluster}", deadly=True)
    assert shared == alone and len(killed) == 2
    said = [event.message for event in heard if isinstance(event, Said)]
    assert "2 workers of 1 thread each" in said
    assert sum("was lost" in line and "its task is done again" in line for line in said) == 2


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_ray_starts_a_cluster_of_its_own(tmp_path):
    needs_ray()
    recipe = written(tmp_path, NET, MIN_SAMPLES)
    assert stepped(recipe, "shared", "ray")[0] == stepped(recipe, "alone")[0]

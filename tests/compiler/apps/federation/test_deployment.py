"""A local deployment: keys and certificates, processes by id, ports; and once, the whole of it on Flower."""

import datetime
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from effc.compiler.apps.federation import deployment
from effc.compiler.apps.federation.declaration import read_declaration
from effc.compiler.apps.federation.generated_code import refuse_foreign_code
from effc.compiler.apps.federation.identities import check_certificates, write_keys_and_certificates
from effc.compiler.apps.federation.processes import (
    Process,
    accepts_connections,
    free_ports,
    is_port_in_use,
    last_log_line,
    start_process,
    terminate_live_processes,
)
from effc.dsl.syntax.diagnostics import Reject

pytest.importorskip("cryptography")


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "keys"
    write_keys_and_certificates(folder, 2)
    return folder


def slug(refused) -> str:
    return refused.value.diagnostics[0].slug


def test_keys_are_p384_in_the_form_that_flower_reads_and_nobody_else_may(keys):
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

    for number in range(2):
        private = load_ssh_private_key((keys / f"node{number}").read_bytes(), None)
        assert private.curve.name == "secp384r1"
        public = load_ssh_public_key((keys / f"node{number}.pub").read_bytes())
        assert public.public_numbers() == private.public_key().public_numbers()
    assert keys.stat().st_mode & 0o077 == 0 and all(f.stat().st_mode & 0o077 == 0 for f in keys.iterdir())


def test_the_server_certificate_is_signed_by_the_ca_for_loopback(keys):
    import ssl
    import threading

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys / "server.crt", keys / "server.key")
    trusting = ssl.create_default_context(cafile=str(keys / "ca.crt"))
    trusting.verify_flags |= ssl.VERIFY_X509_STRICT  # as Python 3.13 does
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            one, _ = listening.accept()
            with context.wrap_socket(one, server_side=True) as secure:
                secure.sendall(b"here")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with (
            socket.create_connection(listening.getsockname()) as plain,
            trusting.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
        ):
            assert secure.recv(4) == b"here"
        thread.join(5)


def test_certificates_that_are_missing_or_over_are_refused(keys, tmp_path):
    check_certificates(keys)
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=60)
    with pytest.raises(Reject) as refused:
        check_certificates(keys, later)
    assert slug(refused) == "bad-deployment-certificate" and "is good from" in str(refused.value)
    with pytest.raises(Reject) as refused:
        check_certificates(tmp_path)
    assert slug(refused) == "bad-deployment-certificate"


@pytest.mark.slow
def test_a_process_is_known_by_its_start_and_ended_with_what_it_started(tmp_path):
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print('up', flush=True); time.sleep(60)"
    made = start_process("one", [sys.executable, "-c", code], os.environ, tmp_path)
    until = time.monotonic() + 20
    while last_log_line(made.log) != "up" and time.monotonic() < until:
        time.sleep(0.05)
    assert made.is_alive
    other = Process("other", made.pid, "123", made.log)  # its id was given to another process since
    assert not other.is_alive and terminate_live_processes([other]) == [] and made.is_alive
    assert terminate_live_processes([made]) == ["one"] and not made.is_alive
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # nothing of its session is left
            os.killpg(made.pid, 0)
            time.sleep(0.05)


def test_what_a_process_said_last_is_told_without_its_colours(tmp_path):
    (tmp_path / "log").write_bytes(b"first\n\x1b[93mWARNING \x1b[0m:   trying again\n\n")
    assert (
        last_log_line(str(tmp_path / "log")) == "WARNING :   trying again"
        and last_log_line(str(tmp_path / "none")) == ""
    )


def test_a_port_in_use_is_told_and_free_ones_are_free():
    (port,) = free_ports(1)
    assert not is_port_in_use(port) and not accepts_connections(port)
    with socket.create_server(("127.0.0.1", port)):
        assert is_port_in_use(port) and accepts_connections(port)


class Declared:
    clients, folder = 2, "model"


@pytest.fixture
def flower(tmp_path, monkeypatch):
    """Commands of Flower's names: a SuperLink that listens or dies, and the rest that stay."""
    commands = tmp_path / "commands"
    commands.mkdir()
    listen = (
        "import socket, sys, time; a = sys.argv; s = socket.create_server(('127.0.0.1', int(a[a.index('--port') + 1])))"
    )
    said = '{"success": true, "run-id": "7", "runs": [{"status": "finished:failed", "status-details": "no reply"}]}'
    bodies = {
        "flower-superlink": f"{listen}; time.sleep(60)",
        "flower-superexec": "import time; time.sleep(60)",
        "flower-supernode": "import time; time.sleep(60)",
        "flwr": f"print('{said}')",
    }
    for name, body in bodies.items():
        file = commands / name
        file.write_text(f"#!{sys.executable}\n{body}\n")
        file.chmod(0o700)
    monkeypatch.setattr(deployment, "flower_command_folder", lambda: commands)
    return commands


def with_changes(**changes):
    honest = {"name": "node0", "pid": 123456, "started": "1", "log": "{folder}/node0.log"} | changes
    top = {name: honest.pop(name) for name in ("port", "run") if name in honest}
    return {"format": 1, "port": 9092, "run": "7", "processes": [honest], **top}


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": 0, "started": ""},
        {"pid": 1},
        {"pid": -5},
        {"pid": True},
        {"pid": "../../tmp/x"},
        {"started": None},
        {"log": "/dev/zero"},
        {"name": "../node0"},
        {"port": 10**9},
        {"run": "--help"},
    ],
    ids=str,
)
def test_a_deployment_that_somebody_sent_ends_no_processes_and_opens_no_files(tmp_path, changes):
    body = json.dumps(with_changes()).replace("{folder}", str(tmp_path))
    (tmp_path / "deployment.json").write_text(body)
    assert not deployment.read_deployment(tmp_path).processes[0].is_alive
    (tmp_path / "deployment.json").write_text(json.dumps(with_changes(**changes)).replace("{folder}", str(tmp_path)))
    with pytest.raises(Reject) as refused:
        deployment.read_deployment(tmp_path)
    assert slug(refused) == "not-deployed"


def test_a_process_that_is_none_does_not_live_because_it_has_no_start(tmp_path):
    assert not Process("node0", 4_000_000, "", str(tmp_path / "log")).is_alive


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("fedapp/server_app.py", "import os"),
        ("fedapp/__init__.py", '"""The Flower App of the federation x."""\nimport os\n'),
        ("fedapp/__init__.py", '"""The Flower App of the federation x."""\n""".""" + str(1)\n'),
        ("torch.py", ""),
        ("fedapp/__pycache__/server_app.cpython-311.pyc", ""),
        (".hidden/sitecustomize.py", ""),
        ("fedapp/native.cpython-311-x86_64-linux-gnu.so", ""),
        ("pyproject.toml", '[build-system]\nrequires = ["evil"]\n'),
        ("setup.cfg", ""),
    ],
)
def test_code_that_effc_did_not_write_is_not_deployed(tmp_path, name, text):
    declared = read_declaration(honest_app(tmp_path) / "fedapp" / "federation.json")
    refuse_foreign_code(tmp_path / "flower", declared)
    file = tmp_path / "flower" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    with pytest.raises(Reject) as refused:
        refuse_foreign_code(tmp_path / "flower", declared)
    assert slug(refused) == "foreign-code" and name in str(refused.value)


def honest_app(folder):
    with tarfile.open(Path(__file__).parents[3] / "stored" / "kinds.tar.xz") as archive:
        archive.extractall(folder, [m for m in archive if m.name.startswith("kinds/flower/")], filter="data")
    return (folder / "kinds" / "flower").rename(folder / "flower")


def test_up_starts_all_status_tells_and_down_ends_all(flower, tmp_path):
    folder = tmp_path / "fed-deployment"
    made = deployment.start_deployment(tmp_path / "fed", Declared, folder, tmp_path, (), tmp_path / "cache")
    try:
        assert [p.name for p in made.processes] == [
            "superlink",
            "server",
            "node0",
            "node1",
        ] and not made.stopped_processes
        assert made.run == "7" and deployment.read_deployment(folder) == made
        assert deployment.run_status(made)[:2] == ("finished:failed", "no reply")
        with pytest.raises(Reject) as refused:
            deployment.start_deployment(tmp_path / "fed", Declared, folder, tmp_path, (), tmp_path / "cache")
        assert slug(refused) == "deployed-already"
        os.killpg(made.processes[2].pid, signal.SIGKILL)
        os.waitpid(made.processes[2].pid, 0)
        assert [p.name for p in made.stopped_processes] == ["node0"]
        assert not made.broken  # rounds go on without a node
        os.killpg(made.processes[1].pid, signal.SIGKILL)
        os.waitpid(made.processes[1].pid, 0)
        assert [p.name for p in made.broken] == ["server"]
    finally:
        names = deployment.stop_deployment(made)
    assert names == ["node1", "superlink"] and len(made.stopped_processes) == 4
    assert not (folder / "keys").exists() and (folder / "superlink.log").exists()
    with pytest.raises(Reject) as refused:
        deployment.read_deployment(folder)
    assert slug(refused) == "not-deployed"


def test_every_process_is_told_what_flower_does_not_do_by_itself(flower, tmp_path):
    place = tmp_path / "fed-deployment"
    made = deployment.start_deployment(
        tmp_path / "fed", Declared, place, tmp_path, (tmp_path, tmp_path), tmp_path / "cache"
    )
    try:
        said = {p.name: Path(f"/proc/{p.pid}/cmdline").read_bytes().decode().split("\0") for p in made.processes}
        env = Path(f"/proc/{made.processes[0].pid}/environ").read_bytes().decode().split("\0")
    finally:
        deployment.stop_deployment(made)
    link = said["superlink"]
    assert link[link.index("--host") + 1] == "127.0.0.1"  # whoever reaches it can run code
    assert {"--database", "--enable-supernode-auth", "--ssl-certfile", "--superexec-auth-secret-file"} <= set(link)
    assert link[link.index("--isolation") + 1] == "process" and "--disable-runtime-dependency-installation" in link
    assert "--superexec-auth-secret-file" in said["server"]  # without it, it ends with status 0
    for node in ("node0", "node1"):
        assert said[node][said[node].index("--max-retries") + 1] == "5"  # else a wrong CA is tried for ever
    ports = [said[name][said[name].index("--port") + 1] for name in ("superlink", "node0", "node1")]
    assert len(set(ports)) == 3
    assert {"FLWR_TELEMETRY_ENABLED=0", "FLWR_DISABLE_UPDATE_CHECK=1"} <= set(env)
    assert any(line.startswith(f"FLWR_HOME={place}") for line in env)


def test_what_does_not_come_up_is_ended_and_told_with_its_last_words(flower, tmp_path):
    (flower / "flower-superlink").write_text(f"#!{sys.executable}\nimport sys; sys.exit('no disk')\n")
    with pytest.raises(Reject) as refused:
        deployment.start_deployment(tmp_path / "fed", Declared, tmp_path / "d", tmp_path, (), tmp_path / "cache")
    assert slug(refused) == "deployment-failed" and "no disk" in str(refused.value)
    assert not (tmp_path / "d" / "keys").exists() and not (tmp_path / "d" / deployment.NAME).exists()


def test_bad_places_are_refused_before_anything_starts(flower, tmp_path):
    (port,) = free_ports(1)
    for own, asked, wanted in (
        ((tmp_path,), 0, "not-deployed"),
        ((tmp_path, tmp_path / "gone"), 0, "not-deployed"),
        ((), port, "port-taken"),
    ):
        with socket.create_server(("127.0.0.1", port)), pytest.raises(Reject) as refused:
            deployment.start_deployment(
                tmp_path / "fed", Declared, tmp_path / "d", tmp_path, own, tmp_path / "cache", asked
            )
        assert slug(refused) == wanted and not (tmp_path / "d").exists()


def test_without_flower_or_with_another_the_range_is_named(monkeypatch):
    import importlib.metadata as metadata

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    for found, says in ((absent, "flwr is not installed"), (lambda name: "1.20.0", "flwr 1.20.0 is installed")):
        monkeypatch.setattr(metadata, "version", found)
        with pytest.raises(Reject) as refused:
            deployment.flower_command_folder()
        assert slug(refused) == "no-flower" and says in str(refused.value)
        assert ">=1.42,<1.43" in str(refused.value) + refused.value.diagnostics[0].help


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_three_nodes_with_their_own_data_run_on_flower(tmp_path):
    """With EFFC_FLOWER, an environment's `bin` that has flwr and effc, where this one lacks flwr."""
    bin_ = Path(os.environ.get("EFFC_FLOWER", Path(sys.executable).parent))
    if not (bin_ / "flower-superlink").exists():
        pytest.skip("needs flwr, here or in EFFC_FLOWER")
    from tests.compiler.apps.federation.test_flower_target import compiled, savings_table

    artifact = compiled(tmp_path, "strategy: abm, deadline: 300s")
    own = [tmp_path / f"own{k}" for k in range(3)]
    for place in own:
        place.mkdir()
        savings_table(place)
    env = {**os.environ, "EFFC_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def effc(*words):
        return subprocess.run([bin_ / "effc", "federate", *words], env=env, capture_output=True, text=True, check=False)

    data = [word for place in own for word in ("--data", str(place))]
    try:
        up = effc("up", str(artifact), *data, "--wait", "--format", "json")
        assert up.returncode == 0, up.stdout + up.stderr
        assert json.loads(up.stdout)["status"] == "finished:completed"
        result = artifact.with_name("fed-deployment") / "result"
        rounds = json.loads((result / "federation-result.json").read_text())["rounds"]
        assert [sorted(r["turns"]) for r in rounds] == [["0", "1", "2"]] * 2
        assert rounds[0]["turns"]["0"]["examples"] == 27  # all 36 of its own folder, a quarter held back
        assert sorted(f.name for f in result.iterdir() if f.is_dir()) == ["client-0", "client-1", "client-2"]
    finally:
        down = effc("down", str(artifact))
    assert down.returncode == 0 and "superlink" in down.stderr + down.stdout
    shutil.rmtree(artifact.with_name("fed-deployment"))

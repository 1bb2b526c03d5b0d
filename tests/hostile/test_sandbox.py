"""Verbs that read what others made are confined: no file is written but the cache's, none read that was not named."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import typer
from effc.compiler.cli.confinement import SWITCHES, confine_verb
from effc.compiler.cli.main import make_app
from effc.compiler.core import sandbox
from effc.compiler.core.cache import Cache
from effc.compiler.core.temporary_folder import make_temporary_folder
from effc.compiler.models.checkpoints.text_process import CHILD

from tests.compiler.cli.verbs.conftest import SCRIPT, own_cache, process  # noqa: F401
from tests.hostile.kinds import honest

pytestmark = pytest.mark.skipif(not sandbox.landlock_version(), reason="this kernel has no Landlock")

# What somebody would try who runs code in the process of a verb. It runs at the end of that very process.
ATTACK = """
import atexit, fcntl, json, os, socket, subprocess, sys, termios

def tried(call):
    try:
        call()
    except (OSError, subprocess.SubprocessError) as error:
        return getattr(error, "errno", 13)
    return "done"

def attack():
    secret, parent = os.environ["SECRET"], os.environ["PARENT"]
    told = {
        "reads a secret": tried(lambda: open(secret).read()),
        "lists its folder": tried(lambda: os.listdir(os.path.dirname(secret))),
        "writes a file": tried(lambda: open(os.path.dirname(secret) + "/new", "w")),
        "cuts a file": tried(lambda: os.truncate(secret, 0)),
        "opens a file to others": tried(lambda: os.chmod(secret, 0o666)),
        "gives a file away": tried(lambda: os.chown(secret, 0, 0)),
        "marks a file": tried(lambda: os.setxattr(secret, "user.mark", b"")),
        "types at the terminal": tried(lambda: fcntl.ioctl(0, termios.TIOCSTI, b"x")),
        "removes a file": tried(lambda: os.remove(secret)),
        "writes to the artifact": tried(lambda: open(os.environ["ARTIFACT"] + "/new", "w")),
        "opens a socket": tried(lambda: socket.socket()),
        "opens a local socket": tried(lambda: socket.socket(socket.AF_UNIX)),
        "ends another process": tried(lambda: os.kill(int(parent), 0)),
        "has a child do it": tried(lambda: subprocess.run(["cat", secret], check=True, capture_output=True)),
    }
    os.write(2, ("\\nATTACK " + json.dumps(told) + "\\n").encode())

if os.environ.get("VERB") in sys.orig_argv:
    atexit.register(attack)
"""
SERVER = """
import signal

def attack_and_connect(*_):
    attack()
    with socket.socket() as one:
        os.write(2, f"\\nCONNECT {one.connect_ex(('127.0.0.1', 1))}\\n".encode())

if os.environ.get("VERB") in sys.orig_argv:
    signal.signal(signal.SIGUSR1, attack_and_connect)
"""
VERBS = {
    "verify": ("native", "verify {}"),
    "verify onnx": ("onnx", "verify {}"),
    "inspect": ("stock", "inspect {}"),
    "inspect a plan": ("native", "inspect {}"),
    "run": ("int4", "run {} --prompt a -n 1"),
    "run a form": ("stock", "run {}/model --prompt a -n 1"),
    "inspect compact": ("compact", "inspect {}"),
    "run onnx": ("onnx", "run {} --prompt a -n 1"),
    "run gguf": ("gguf", "run {} --prompt a -n 1"),
    "run samples": ("rttc", "run {} --prompt a -n 1"),
    "run a point": ("front", "run {} --pick 1 --prompt a -n 1"),
    "run a point of shared weights": ("family", "run {} --pick 1 --prompt a -n 1"),
    "run adapters": ("peft", "run {} --prompt a -n 1"),
    "run interventions": ("reft", "run {} --prompt a -n 1"),
    "verify a federation": ("flower", "verify {}"),
    "inspect a federation": ("flower", "inspect {}"),
    "doctor": ("stock", "doctor --trust {}"),
    "diff": ("stock", "diff {} {}"),
}

QUICK = ("verify",)  # the others take a minute


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    return honest(tmp_path_factory.mktemp("sandbox"))


@pytest.fixture
def attacked(process, artifacts, tmp_path):  # noqa: F811
    """Run a verb over an artifact, and what an attack in its process came to."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "sitecustomize.py").write_text(ATTACK)
    secret = tmp_path / "home" / "secret"
    secret.parent.mkdir()
    secret.write_text("a secret")

    def run(kind: str, words: str, **env: str):
        line = words.replace("{}", str(artifacts / kind)).split()
        known = {"SECRET": str(secret), "PARENT": str(os.getpid()), "ARTIFACT": str(artifacts / kind), "VERB": line[0]}
        done = process(*line, "--offline", PYTHONPATH=str(tmp_path / "code"), **known, **env)
        told = [line for line in done.err.splitlines() if line.startswith("ATTACK ")]
        return done, json.loads(told[-1].removeprefix("ATTACK ")) if told else None

    return run


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in VERBS if n not in QUICK)])
def test_code_that_runs_in_a_verb_reaches_nothing_and_the_verb_says_what_it_says_without(
    attacked, artifacts, name, tmp_path
):
    free, done_freely = attacked(*VERBS[name], EFFC_SANDBOX="off")
    assert free.code == 0 and done_freely["reads a secret"] == "done"
    (tmp_path / "home" / "secret").write_text("a secret")
    (artifacts / VERBS[name][0] / "new").unlink()
    confined, done = attacked(*VERBS[name])
    assert (confined.code, confined.out) == (0, free.out), confined.err
    if sandbox.landlock_version() < 6:
        del done["ends another process"]
    assert set(done.values()) <= {1, 13}, done
    assert (tmp_path / "home" / "secret").read_text() == "a secret"


def test_a_server_of_samples_may_be_asked(artifacts):
    code = (
        "import socket, sys; from effc.compiler.cli.confinement import confine_verb;"
        f"confine_verb(['run', {str(artifacts / 'rttc')!r}, '--knowledge', 'http://127.0.0.1:1'])\n"
        "socket.socket().close()\n"
        "try: open('/etc/shadow')\nexcept PermissionError: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "compile r.effspec", "run zoo:tiny-llama", "run {federation}", "run {stock} --trust-remote-code",
        "run {stock} --device cuda", "serve hf:org/name --adapter law={stock}", "inspect r.effspec", "doctor", "doctor --cache-dir {stock}",
    ],
)  # fmt: skip
def test_what_trains_fetches_or_was_granted_is_not_confined(artifacts, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.effspec").write_text("effspec 1\n")
    asked = []
    monkeypatch.setattr(sandbox, "confine_process", lambda *args, **more: asked.append(args))
    confine_verb(words.format(federation=artifacts / "flower", stock=artifacts / "stock").split())
    assert not asked
    confine_verb(["run", str(artifacts / "stock")])
    assert asked


def test_interventions_may_name_a_model_and_no_other_folder(artifacts, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sandbox, "confine_process", lambda readable, *args, **more: asked.extend(readable))
    case = shutil.copytree(artifacts / "reft", tmp_path / "reft")
    credentials, site = tmp_path / "keys", tmp_path / "site" / "model"
    for folder, config in ((credentials, {"auths": {}}), (site, {"model_type": "llama"})):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
    (site / "model.safetensors").touch()
    (site.parent / "manifest.json").write_text('{"name": "a site"}')
    for place in (credentials, site, artifacts / "stock" / "model"):
        body = json.loads((case / "reft" / "reft.json").read_text())
        body["base"]["place"] = str(place)
        (case / "reft" / "reft.json").write_text(json.dumps(body))
        asked.clear()
        confine_verb(["run", str(case)])
        assert (place in asked, artifacts / "stock" in asked) == (place != credentials, place.is_relative_to(artifacts))
        assert site.parent not in asked


def test_a_prompt_that_names_a_folder_opens_none(artifacts, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sandbox, "confine_process", lambda readable, *args, **more: asked.extend(readable))
    for words in (["-p", "/"], ["--prompt=/"], ["--prompt", "/"], ["--cache-dir", str(tmp_path)]):
        confine_verb(["run", *words, str(artifacts / "stock" / "model")])
    hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"), "hub")
    result = Path(f"{artifacts / 'stock' / 'model'}-result")
    assert set(asked) - {hub, result} == {artifacts / "stock" / "model", artifacts / "stock"}


def test_a_reload_opens_the_folders_around_models_and_adapters_and_no_others(artifacts, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sandbox, "confine_process", lambda readable, *args, **more: asked.extend(readable))
    for name in ("models/a", "adapters/law", "words/name"):
        (tmp_path / name).mkdir(parents=True)
    words = ["serve", "--reload", f"a={tmp_path}/models/a", "--adapter", f"a:law={tmp_path}/adapters/law"]
    confine_verb([*words, "--name", f"{tmp_path}/words/name"])
    assert {tmp_path / "models", tmp_path / "adapters"} <= set(asked) and tmp_path / "words" not in asked


def test_every_option_of_serve_without_a_value_is_known_to_the_confinement():
    serve = typer.main.get_command(make_app(["serve"])).commands["serve"]
    flags = [p for p in serve.params if getattr(p, "is_flag", False) or getattr(p, "count", False)]
    names = {name for flag in flags for name in (*flag.opts, *flag.secondary_opts) if name.startswith("--")}
    assert names | {"--help"} == set(SWITCHES)


@pytest.mark.slow
def test_temporary_files_are_gone_when_a_verb_ends(process, artifacts, tmp_path):  # noqa: F811
    cache = tmp_path / "cache"
    assert process("verify", artifacts / "onnx", "--cache-dir", cache).code == 0
    assert not list((cache / "work").glob("effc-*")) and list(tmp_path.iterdir()) == [cache]


def test_an_option_without_its_value_is_a_mistake_of_the_command_line(process, artifacts):  # noqa: F811
    done = process("verify", artifacts / "onnx", "--cache-dir")
    assert done.code == 2 and "--cache-dir" in done.err and "Traceback" not in done.err


@pytest.mark.parametrize("name", ["fedapp", "config.effspec"])
def test_no_name_inside_an_artifact_or_of_it_leaves_a_verb_unconfined(artifacts, tmp_path, monkeypatch, name):
    asked = []
    monkeypatch.setattr(sandbox, "confine_process", lambda *args, **more: asked.append(args))
    case = shutil.copytree(artifacts / "native", tmp_path / name)
    (case / "fedapp").mkdir()
    confine_verb(["run", str(case)])
    assert asked


@pytest.mark.parametrize("name", ["points", "snapshots"])
def test_a_folder_that_is_called_as_those_of_points_are_opens_none_above_it(artifacts, tmp_path, monkeypatch, name):
    asked = []
    monkeypatch.setattr(sandbox, "confine_process", lambda readable, *args, **more: asked.extend(readable))
    case = shutil.copytree(artifacts / "native", tmp_path / "home" / name / "evil")
    confine_verb(["run", str(case)])
    assert case in asked and tmp_path / "home" not in asked


def test_the_process_that_tokenises_is_confined_whatever_started_it(tmp_path):
    for folder in ("code", "home"):
        (tmp_path / folder).mkdir()
    (tmp_path / "code" / "sitecustomize.py").write_text(ATTACK)
    secret = tmp_path / "home" / "secret"
    secret.write_text("a secret")
    known = {"SECRET": str(secret), "PARENT": str(os.getpid()), "ARTIFACT": str(secret.parent), "VERB": str(CHILD)}
    command = [sys.executable, "-P", str(CHILD)]
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "code"), **known}
    for off, optimized in (("", ""), ("", "1"), ("off", "")):
        settings = {sandbox.OFF: off, "PYTHONOPTIMIZE": optimized}
        done = subprocess.run(command, env={**env, **settings}, input="", capture_output=True, text=True)
        told = json.loads(done.stderr.partition("ATTACK ")[2])
        assert (told["reads a secret"], told["opens a socket"]) == (("done", "done") if off else (13, 1)), told
    assert not secret.exists()  # left as it was until the sandbox was off


@pytest.mark.slow
def test_a_server_answers_confined_and_writes_its_log_alone(process, artifacts, tmp_path):  # noqa: F811
    """The attack runs within it; it may listen, and connect to nobody."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "sitecustomize.py").write_text(ATTACK + SERVER)
    secret, log = tmp_path / "home" / "secret", tmp_path / "logs" / "access"
    for file in (secret, log):
        file.parent.mkdir()
    secret.write_text("a secret")
    known = {"SECRET": str(secret), "PARENT": str(os.getpid()), "ARTIFACT": str(artifacts / "stock"), "VERB": "serve"}
    words = ["serve", str(artifacts / "stock"), "--name", "m", "--port", "0", "--access-log", str(log), "--offline"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "code"), **known}
    command = [sys.executable, "-c", SCRIPT, *words]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        url = server.stdout.readline().split()[-1]
        body = json.dumps({"model": "m", "prompt": "a", "max_tokens": 1}).encode()
        request = urllib.request.Request(f"{url}/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 200
        until = time.monotonic() + 60
        while not log.read_text().endswith("\n") and time.monotonic() < until:  # it is written after the answer
            time.sleep(0.05)
        server.send_signal(signal.SIGUSR1)
        lines = []
        for line in server.stderr:
            lines.append(line)
            if line.startswith("CONNECT "):
                break
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 130
    assert not list(Path(os.environ["EFFC_CACHE_DIR"], "work").glob(f"effc-{server.pid}-*"))
    told = json.loads("".join(lines).partition("ATTACK ")[2].splitlines()[0])
    assert lines[-1] == "CONNECT 1\n", lines
    assert told.pop("opens a socket") == "done"
    if sandbox.landlock_version() < 6:
        del told["ends another process"]
    assert set(told.values()) <= {1, 13}, told
    assert secret.read_text() == "a secret" and json.loads(log.read_text())["status"] == 200


SOCKETS = """
import os, socket, sys
from effc.compiler.core.sandbox import confine_process
confine_process((), (), sys.argv[1])
def connect(): socket.socket().connect(("127.0.0.1", 1))
def send_early(): socket.socket().sendto(b"a", 0x20000000, ("127.0.0.1", 1))
def write_memory(): os.close(os.open("/dev/shm/effc-test", os.O_CREAT | os.O_WRONLY))
for kind, attempt in {
    "tcp": lambda: socket.create_server(("127.0.0.1", 0)).close(), "pair": socket.socketpair,
    "udp": lambda: socket.socket(type=socket.SOCK_DGRAM), "raw": lambda: socket.socket(type=socket.SOCK_RAW),
    "other protocol": lambda: socket.socket(proto=262), "local": lambda: socket.socket(socket.AF_UNIX),
    "kernel": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW), "connect": connect, "send early": send_early,
    "pair of datagrams": lambda: socket.socketpair(type=socket.SOCK_DGRAM), "shared memory": write_memory,
    "terminal": lambda: open("/dev/tty", "w"),
}.items():
    try:
        attempt()
        print(kind)
    except PermissionError:
        pass
"""


@pytest.mark.parametrize(("network", "allowed"), [("none", ["pair"]), ("listen", ["tcp", "pair"])])
def test_a_server_has_sockets_of_tcp_alone_and_no_verb_more_than_pairs(network, allowed):
    done = subprocess.run([sys.executable, "-c", SOCKETS, network], capture_output=True, text=True)
    assert done.stdout.split("\n") == [*allowed, ""], done.stderr


READS = "import sys; from effc.compiler.core.sandbox import confine_process; confine_process((), ()); open(sys.argv[1])"


@pytest.mark.parametrize("search", [":/nowhere", "{home}", "{home}/.."])
def test_no_entry_of_the_search_path_opens_the_home_or_the_working_directory(tmp_path, search):
    home = tmp_path / "user" / "home"
    home.mkdir(parents=True)
    (tmp_path / "secret").touch()
    (home / "secret").symlink_to(tmp_path / "secret")
    (home / "key").touch()
    env = {**os.environ, "HOME": str(home), "PYTHONPATH": search.format(home=home)}
    for file in (home / "key", home / "secret"):
        command = [sys.executable, "-c", READS, str(file)]
        done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)
        assert done.stderr.endswith(f"Permission denied: '{file}'\n"), done.stderr


def test_packages_that_an_installer_linked_are_imported_in_the_sandbox(tmp_path):
    """As folders, files, or file by file."""
    site = tmp_path / "site"
    for folder in (site, tmp_path / "a", tmp_path / "b" / "filewise", tmp_path / "c"):
        folder.mkdir(parents=True)
    for file in ("a/one.py", "b/filewise/__init__.py", "b/filewise/part.py", "c/__init__.py"):
        (tmp_path / file).touch()
    (site / "one.py").symlink_to(tmp_path / "a" / "one.py")
    (site / "whole").symlink_to(tmp_path / "c")
    (site / "filewise").mkdir()
    for name in ("__init__.py", "part.py"):
        (site / "filewise" / name).symlink_to(tmp_path / "b" / "filewise" / name)
    code = "from effc.compiler.core.sandbox import confine_process; confine_process((), ())"
    code += "; import one, whole, filewise.part"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_a_prompt_that_reads_as_an_option_grants_nothing(artifacts, monkeypatch):
    asked = []
    monkeypatch.setattr(sandbox, "confine_process", lambda *args, **more: asked.append(args))
    for option in ("--trust-remote-code", "--device"):
        confine_verb(["run", str(artifacts / "stock"), "-p", option])
    assert len(asked) == 2


@pytest.mark.parametrize("mode", [0o777, 0o700])
def test_nothing_is_written_to_a_cache_that_others_can_write_to(artifacts, tmp_path, monkeypatch, mode):
    monkeypatch.setattr(sandbox, "confine_process", lambda *args, **more: None)
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(mode)
    confine_verb(["verify", str(artifacts / "stock"), "--cache-dir", str(cache)])
    assert bool(list(cache.iterdir())) == (mode == 0o700)


def test_temporary_files_of_a_process_that_runs_are_not_cleaned_away(tmp_path):
    (tmp_path / "work").mkdir()
    running = make_temporary_folder(tmp_path / "work")
    (tmp_path / "work" / f"effc-{1 << 30}-left").mkdir()
    Cache(tmp_path).evict_unused_and_count_bytes(keep_seconds=0)
    assert list((tmp_path / "work").iterdir()) == [running]

"""Commands that are killed at any moment: what they write is whole or absent, and the same command ends as ever.

EFFC_KILLS sets how often each is killed; `pytest -s` prints the moments.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from effc.compiler.artifacts.manifest import artifact_hash, verify_files
from effc.compiler.artifacts.signature import find_valid_signer
from effc.compiler.artifacts.signing_keys import write_key_pair
from effc.compiler.core.cache import Cache

from tests import worlds
from tests.compiler.apps.serving.conftest import chatty  # noqa: F401
from tests.hostile import kinds

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(3600)]
KILLS = int(os.environ.get("EFFC_KILLS", "12"))
EFFC = (sys.executable, "-c", "import sys; from effc.compiler.cli.main import main; sys.exit(main())")
MARK = {"EFFC_TEST_MARK": uuid4().hex}  # in the environment of all that is started here
RECIPE = """effspec 1
model base = hf("./m")
data  rows = synthetic(8, length: 12, seed: 1)
pipeline healed(base) {
  thin = prune.channels(keep: 66% of channels, align: 8)
  fit = tune.heal(data: rows, steps: 400, batch: 2, lr: 1e-2, save: 20)
}
emit healed { hf("healed") }
"""


def start(words: list, cwd: Path, **options) -> subprocess.Popen:
    env = {**os.environ, **MARK, "OMP_NUM_THREADS": "1", "EFFC_CACHE_DIR": str(cwd / "cache")}
    return subprocess.Popen([*EFFC, *map(str, words)], cwd=cwd, env=env, text=True, **options)


def processes() -> list[str]:
    """Command lines of what was started here and lives, this process left out."""
    lives, mark = [], f"EFFC_TEST_MARK={MARK['EFFC_TEST_MARK']}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (folder / "environ").read_bytes():
                lives.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return lives


def nothing_lives(seconds: float = 60) -> list[str]:
    """What still lives after so long."""
    until = time.monotonic() + seconds
    while (left := processes()) and time.monotonic() < until:
        time.sleep(0.1)
    return left


@dataclass
class Verb:
    """A command that is killed.

    words    its command line
    sound    raises where what lies there is neither whole nor absent
    outcome  of a run that was not disturbed
    forget   removes what it wrote, so that it begins anew
    """

    words: list
    cwd: Path
    sound: Callable[[], None]
    outcome: Callable[[], object]
    forget: Callable[[], None]

    def run(self) -> tuple[float, object]:
        """Seconds and outcome of a whole run."""
        started = time.monotonic()
        process = start(self.words, self.cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        error = process.communicate()[1]
        assert process.returncode == 0, error
        return time.monotonic() - started, self.outcome()

    def kill_often(self, seed: int) -> list[str]:
        """Kill it at moments of its whole time; one that ended before is begun anew."""
        span, whole = self.run()
        self.forget()
        draw, moments, ended = random.Random(seed), [], 0
        while len(moments) < KILLS:
            process = start(self.words, self.cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            moment = draw.uniform(0.2, 1.0) * span
            with suppress(subprocess.TimeoutExpired):
                process.wait(moment)
            process.kill()
            if process.wait() == -signal.SIGKILL:
                moments.append(f"{moment:.1f}")
            else:
                assert process.returncode == 0
                ended += 1
                self.forget()
            self.sound()
            assert nothing_lives() == []
        assert self.run()[1] == whole and nothing_lives() == []
        print(f"\n{self.words[0]}: whole in {span:.1f} s, killed {KILLS} times after {', '.join(moments)} s,", end=" ")
        print(f"{ended} ended before")
        return moments


def whole_or_absent(artifact: Path) -> None:
    if (artifact / "manifest.json").exists():
        verify_files(artifact)
    else:
        assert not artifact.exists()


def remove(*paths: Path) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def test_a_compile_that_heals(tmp_path):
    worlds.llama(tmp_path / "m")
    (tmp_path / "r.effspec").write_text(RECIPE)
    out, cache = tmp_path / "out", tmp_path / "cache"
    words = ["compile", "r.effspec", "-o", "out", "--offline", "--no-progress"]
    words.append("--force")  # killed after its last write it is there

    def sound():
        whole_or_absent(out / "healed")
        assert not list(Cache(cache).damaged_files_with_faults())

    Verb(words, tmp_path, sound, lambda: artifact_hash(out / "healed"), lambda: remove(out, cache)).kill_often(1)
    assert [path.name for path in out.iterdir()] == ["healed"]


def test_pick(tmp_path):
    front, out = kinds.honest(tmp_path) / "front", tmp_path / "out" / "one"
    words = ["pick", front, "--point", "1", "-o", out, "--force"]  # killed after its last write it is there
    verb = Verb(words, tmp_path, lambda: whole_or_absent(out), lambda: artifact_hash(out), lambda: remove(out))
    verb.kill_often(2)
    verify_files(front)
    assert [path.name for path in out.parent.iterdir()] == ["one"]


def test_sign(tmp_path):
    artifact, key = kinds.honest(tmp_path) / "native", write_key_pair(tmp_path / "key")
    file = artifact / "model.sig"
    words = ["sign", artifact, "--key", tmp_path / "key"]

    def sound():
        assert not file.exists() or find_valid_signer(artifact, [key]) == key
        verify_files(artifact)

    Verb(words, tmp_path, sound, lambda: find_valid_signer(artifact, [key]), lambda: remove(file)).kill_often(3)
    assert not list(artifact.glob(".model.sig*"))


def test_serve(chatty, tmp_path):  # noqa: F811
    """Killed while it starts, waits or answers; the next one takes the same port, and no process of it stays."""
    words = ["serve", chatty, "--name", "m", "--threads", "1", "--access-log", "none", "--port"]
    draw, port, moments = random.Random(4), 0, []
    for number in range(KILLS + 1):
        process = start([*words, port], tmp_path, stdout=subprocess.PIPE)
        url = process.stdout.readline().strip().partition(" at ")[2]
        port = int(url.rpartition(":")[2].partition("/")[0])
        body = {"model": "m", "messages": [{"role": "user", "content": "And"}], "max_tokens": 200}
        if number == KILLS:
            assert httpx.post(f"{url}/chat/completions", json=body, timeout=60).status_code == 200
        else:
            for _ in range(3):
                threading.Thread(target=ask, args=(url, body), daemon=True).start()
            moments.append(draw.uniform(0, 1.0))
            time.sleep(moments[-1])
        process.kill()
        process.communicate()
        assert nothing_lives() == []
        assert not (tmp_path / "cache").exists() or not list(Cache(tmp_path / "cache").damaged_files_with_faults())
    print(f"\nserve: killed {KILLS} times while it answered, after {', '.join(f'{m:.2f}' for m in moments)} s")


def ask(url: str, body: dict) -> None:
    with suppress(httpx.HTTPError):
        httpx.post(f"{url}/chat/completions", json=body, timeout=60)


def test_federate(tmp_path):
    """`up --wait` killed at any moment, at times with a process of the deployment; then `down`, and `up` again."""
    pytest.importorskip("flwr")
    from tests.compiler.apps.federation.test_flower_target import compiled

    artifact = compiled(tmp_path, "strategy: fedavg, deadline: 300s")
    folder = artifact.with_name(f"{artifact.name}-deployment")
    up, down = ["federate", "up", artifact, "--wait"], ["federate", "down", artifact]

    def states() -> dict[str, bytes]:
        return {str(f.relative_to(folder)): f.read_bytes() for f in sorted((folder / "result").rglob("*.safetensors"))}

    def end() -> None:
        process = start(down, tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        error = process.communicate()[1]
        assert process.returncode == 0 or "not-deployed" in error, error
        assert nothing_lives() == []

    started = time.monotonic()
    process = start(up, tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.communicate()[1]
    assert process.returncode == 0, error
    span, whole = time.monotonic() - started, states()
    end()
    assert whole
    remove(folder)
    draw, killed, ended = random.Random(5), [], 0
    while len(killed) < KILLS:
        process = start(up, tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        moment = draw.uniform(0.1, 1.0) * span
        with suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        process.kill()
        if process.wait() == -signal.SIGKILL:
            names = "up"
            if draw.random() < 0.5 and (folder / "deployment.json").is_file():
                victim = draw.choice(json.loads((folder / "deployment.json").read_text())["processes"])
                with suppress(ProcessLookupError):
                    os.killpg(victim["pid"], signal.SIGKILL)
                names = f"up and {victim['name']}"
            killed.append(f"{moment:.0f} s {names}")
        else:
            assert process.returncode == 0
            ended += 1
        end()
        if process.returncode == 0:
            remove(folder)
    process = start(up, tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.communicate()[1]
    assert process.returncode == 0 and states() == whole, error
    end()
    print(f"\nfederate: whole in {span:.0f} s, killed {KILLS} times: {'; '.join(killed)}; {ended} ended before")

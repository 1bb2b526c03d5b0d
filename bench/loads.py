"""Print what hostile clients cost one who behaves: its 95th percentile alone, and during each kind of load.

    python -m bench.loads [MODEL] [--seconds 5] [--only NAME,NAME] [--json FILE]

MODEL is what `effc serve` takes; the embedded Llama with a chat template unless it is named. The server runs as a process of its own with one
thread and two keys; another process sends one kind of load from eight connections (slow ones from 200) under one key,
one after the other for so many seconds, while this one asks for one token at a time under the other key. All is on this
machine, so that the attacker takes processor time from the server, too.
"""

import argparse
import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import httpx

EFFC = (sys.executable, "-c", "import sys; from effc.compiler.cli.main import main; sys.exit(main())")
KEYS = ("a-key-of-the-one-who-behaves", "a-key-of-the-one-who-attacks")
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MIB = 1 << 20
FAST, SLOW = 8, 200  # connections
EMPTY = {"role": "user", "content": ""}
PART = {"type": "text", "text": ""}


def chat_body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "max_tokens": 1, "messages": [EMPTY], **fields}).encode()


def text_body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "max_tokens": 1, "prompt": "a", **fields}).encode()


def chat_request_of_size(message: dict, n_bytes: int = 4 * MIB - 200) -> bytes:
    """Chat request of about `n_bytes` bytes, of as many such messages as fit."""
    text = json.dumps(message, separators=(",", ":"))
    messages = ",".join([text] * (n_bytes // (len(text) + 1)))
    return f'{{"model":"m","max_tokens":1,"messages":[{messages}]}}'.encode()


BODIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "empty messages": (CHAT, lambda: chat_request_of_size(EMPTY)),
    "empty parts": (CHAT, lambda: chat_request_of_size({"role": "user", "content": [PART] * 1000})),
    "messages that are none": (CHAT, lambda: chat_request_of_size({})),
    "one long text": (CHAT, lambda: chat_request_of_size({"role": "user", "content": "a " * (2 * MIB - 200)})),
    "nested metadata": (CHAT, lambda: chat_body(metadata=[[[{}]]] * 300_000)),
    "a bias of every token": (CHAT, lambda: chat_body(logit_bias={str(n): 1 for n in range(300_000)})),
    "long stops": (CHAT, lambda: chat_body(stop=["x" * MIB] * 3)),
    "as many messages as may be": (CHAT, lambda: chat_body(messages=[EMPTY] * 2048)),
    "a word of 60 KB": (TEXT, lambda: text_body(prompt="a" * 60_000)),
    "a word of 3 MB": (TEXT, lambda: text_body(prompt="a" * (3 * MIB))),
    "a million tokens": (TEXT, lambda: text_body(prompt=[5] * MIB)),
    "brackets": (CHAT, lambda: b"[" * (4 * MIB - 1)),
    "a body of 60 MB": (CHAT, lambda: b" " * (60 * MIB)),
    "headers of 60 KB": (TEXT, text_body),
}


def post_in_a_loop(name: str, address: tuple[str, int], end_time: float) -> None:
    """Send one body again and again, a connection each."""
    path, make = BODIES[name]
    body = make()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEYS[1]}"}
    if name == "headers of 60 KB":
        headers |= {f"X-{n}": "a" * 1000 for n in range(60)}
    while time.monotonic() < end_time:
        connection = http.client.HTTPConnection(*address, timeout=60)
        with contextlib.suppress(OSError, http.client.HTTPException):  # cut off before all was sent
            connection.request("POST", path, body, headers)
            connection.getresponse().read()
        connection.close()


def raw_request(body: bytes, *lines: str) -> bytes:
    head = (f"POST {TEXT} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {KEYS[1]}")
    return "\r\n".join((*head, "Content-Type: application/json", *lines, "", "")).encode() + body


def trickle(address: tuple[str, int], end_time: float, start: bytes, chunk: bytes, pause: float) -> None:
    """Send a start, then pieces of a byte or so, on connections that are opened again where they are closed."""
    while time.monotonic() < end_time:
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=10) as connection:
            connection.sendall(start)
            while time.monotonic() < end_time:
                connection.sendall(chunk)
                time.sleep(pause)


def streams_that_nobody_reads(address: tuple[str, int], end_time: float) -> None:
    while time.monotonic() < end_time:
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=10) as connection:
            body = text_body(stream=True, max_tokens=200)
            connection.sendall(raw_request(body, f"Content-Length: {len(body)}"))
            time.sleep(0.5)


def long_answers(address: tuple[str, int], end_time: float) -> None:
    """Requests that are right, and take their places for long."""
    while time.monotonic() < end_time:
        body = text_body(max_tokens=200, temperature=1)
        connection = http.client.HTTPConnection(*address, timeout=60)
        with contextlib.suppress(OSError, http.client.HTTPException):
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEYS[1]}"}
            connection.request("POST", TEXT, body, headers)
            connection.getresponse().read()
        connection.close()


OTHERS: dict[str, tuple[int, Callable[[tuple[str, int], float], None]]] = {
    "slow headers": (SLOW, lambda a, u: trickle(a, u, b"GET /health HTTP/1.1\r\n", b"X: y\r\n", 0.5)),
    "slow bodies": (SLOW, lambda a, u: trickle(a, u, raw_request(b"", "Content-Length: 9999"), b" ", 0.5)),
    "a body in single bytes": (
        FAST,
        lambda a, u: trickle(a, u, raw_request(b"", "Transfer-Encoding: chunked"), b"1\r\n \r\n" * 64, 0),
    ),
    "streams that nobody reads": (4 * FAST, streams_that_nobody_reads),
    "long answers": (4 * FAST, long_answers),
}
KINDS = (*BODIES, *OTHERS)


def attack(load_name: str, host: str, port: int, seconds: float) -> None:
    """Send one kind of load for so long."""
    until, address = time.monotonic() + seconds, (host, port)
    if load_name in BODIES:
        threads = [Thread(target=post_in_a_loop, args=(load_name, address, until)) for _ in range(FAST)]
    else:
        count, work = OTHERS[load_name]
        threads = [Thread(target=work, args=(address, until)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextlib.contextmanager
def temporary_chat_model_folder() -> Iterator[str]:
    """Folder of the embedded model with a chat template."""
    from effc.compiler.inputs.sources.zoo import zoo_folders_by_name

    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(zoo_folders_by_name()["tiny-llama"], folder, dirs_exist_ok=True)
        Path(folder, "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        )
        yield folder


@contextlib.contextmanager
def chat_server_url(model_folder: str) -> Iterator[str]:
    """Address of `effc serve` in a process of its own."""
    keys = [word for key in KEYS for word in ("--api-key", key)]
    command = [
        *EFFC,
        "serve",
        model_folder,
        "--port",
        "0",
        "--threads",
        "1",
        "--name",
        "m",
        "--access-log",
        "none",
        *keys,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip().partition(" at ")[2].removesuffix("/v1")
    finally:
        process.terminate()
        process.wait()


def seconds_of_requests(url: str, seconds: float) -> list[float]:
    """Seconds of each well-behaved request, one after the other for so long, sorted."""
    taken: list[float] = []
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    until = time.monotonic() + seconds
    with httpx.Client(timeout=120, headers=headers) as client:
        while time.monotonic() < until:
            started = time.monotonic()
            body = {"model": "m", "prompt": "And", "max_tokens": 1}
            assert client.post(f"{url}{TEXT}", json=body).status_code == 200
            taken.append(time.monotonic() - started)
            time.sleep(0.02)
    return sorted(taken)


def p95(seconds: list[float]) -> float:
    return seconds[int(0.95 * len(seconds))]


def p95_alone_and_loaded(url: str, load_name: str, seconds: float) -> tuple[float, float]:
    """95th percentile alone, and during a kind of load."""
    host, port = url.removeprefix("http://").split(":")
    alone = p95(seconds_of_requests(url, 2))
    command = [
        sys.executable,
        "-m",
        "bench.loads",
        "--attack",
        load_name,
        "--at",
        host,
        port,
        "--seconds",
        str(seconds + 2),
    ]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1]) as attacker:
        time.sleep(2)  # it imports, and has the server busy
        loaded = p95(seconds_of_requests(url, seconds))
        attacker.wait(120)
    return alone, loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--at", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack:
        attack(options.attack, options.at[0], int(options.at[1]), options.seconds)
        return
    rows = {}
    print(f"{os.cpu_count()} processors; p95 of a request for one token, in ms\n\n{'load':28}  alone  loaded  times")
    models = contextlib.nullcontext(options.model) if options.model else temporary_chat_model_folder()
    with models as model, chat_server_url(model) as url:
        seconds_of_requests(url, 2)  # warm
        for name in options.only.split(","):
            alone, loaded = rows[name] = p95_alone_and_loaded(url, name, options.seconds)
            print(f"{name:28} {alone * 1e3:6.0f} {loaded * 1e3:7.0f} {loaded / alone:6.1f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

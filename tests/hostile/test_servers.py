"""A server of samples may be anybody's: a client takes its answer for samples, or does without it."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from effc.compiler.apps.rttc.engines.index import Unreachable
from effc.compiler.apps.rttc.retrieval import RemoteRetriever

FACTS = {"version": "1", "embedder": "e", "centre": [0.5, 0.25], "samples": 2}


@contextmanager
def answering(*lines: bytes, pause: float = 0.0):
    """A server that answers every request with these bytes; the paths and keys that it was asked with."""
    heard: list[tuple[str, str | None]] = []
    leaving = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append((self.path, self.headers.get("Authorization")))
            for line in lines:
                self.wfile.write(line)
                self.wfile.flush()
                if leaving.wait(pause):
                    return

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", heard
    finally:
        leaving.set()
        server.shutdown()
        server.server_close()


def test_an_answer_is_taken():
    with answering(b"HTTP/1.0 200 OK\r\n\r\n", json.dumps(FACTS).encode()) as (url, _):
        assert RemoteRetriever(url).facts().samples == 2


@pytest.mark.parametrize(
    "body",
    [
        b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps(FACTS | {"samples": float("inf")}).encode(),
        b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps(FACTS | {"centre": [10**400]}).encode(),
        b"HTTP/1.0 200 OK\r\n\r\n" + b"[" * 100_000,
        b"HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\n{}",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/9 what\r\n\r\n",
        b"\xff" * 70_000,
        b"",
    ],
    ids=lambda body: repr(body[-20:]),
)
def test_what_is_no_description_is_no_answer(body):
    with answering(body) as (url, _), pytest.raises(Unreachable):
        RemoteRetriever(url).facts()


def test_a_key_does_not_follow_where_a_server_sends_it():
    with answering(b"HTTP/1.0 200 OK\r\n\r\n{}") as (other, heard):
        moved = f"HTTP/1.0 302 Found\r\nLocation: {other}/v1/knowledge\r\n\r\n".encode()
        with answering(moved) as (url, _), pytest.raises(Unreachable):
            RemoteRetriever(url, key="secret").facts()
    assert not heard


def test_an_answer_that_trickles_in_ends():
    with answering(b"HTTP/1.0 200 OK\r\n\r\n", *[b" "] * 400, pause=0.05) as (url, _), pytest.raises(Unreachable):
        RemoteRetriever(url, seconds=0.1).facts()

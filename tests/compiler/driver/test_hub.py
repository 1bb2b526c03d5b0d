"""Artifacts on the Hugging Face hub: a server in its place, at the boundary of a process that uploads."""

import base64
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from effc.compiler.driver import api

RECIPE = """effspec 1
model base = zoo("tiny-llama")
pipeline same(base) {}
emit same { hf("served") }
"""
UPLOAD = """
import sys
from pathlib import Path
from effc.compiler.driver.hub import upload_artifact
from effc.dsl.syntax.diagnostics import Reject
try:
    print(upload_artifact(Path(sys.argv[1]), sys.argv[2], private=True, revision="v1"))
except Reject as refusal:
    print(*(f"{d.slug}: {d.message} | {d.help}" for d in refusal.diagnostics))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload asks for: files come with the commit, in base64."""

    def log_message(self, *arguments) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_POST(self) -> None:
        body, server = self._body(), self.server
        server.tokens.add(self.headers.get("Authorization"))
        if server.status:
            return self._answer(
                server.status, {"error": "You don't have the rights to create a model under this namespace"}
            )
        address = f"http://127.0.0.1:{server.server_port}/me/tiny"
        if self.path.endswith("/repos/create"):
            server.created = json.loads(body)
            return self._answer(200, {"url": address})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            server.files = {file["path"]: base64.b64decode(file["content"]) for file in files}
            return self._answer(
                200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{address}/commit/{'0' * 40}"}
            )
        return self._answer(200, {"errors": [], "warnings": []})

    def _answer(self, status: int, body: dict) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", len(content))):
            self.send_header(name, str(value))
        if status != 200:
            self.send_header("X-Error-Message", body["error"])
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def hub(status: int = 0):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.status, server.tokens, server.files, server.created = status, set(), {}, {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def upload(artifact, name: str, port: int, **environment: str) -> str:
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_TOKEN": "hf_of_me", "HF_HUB_DISABLE_XET": "1"}
    known = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [sys.executable, "-c", UPLOAD, str(artifact), name]
    return subprocess.run(
        command, env={**known, **settings, **environment}, capture_output=True, text=True, check=True, timeout=120
    ).stdout


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    work = tmp_path_factory.mktemp("hub")
    (work / "recipe.effspec").write_text(RECIPE)
    (result,) = api.compile(work / "recipe.effspec", out=work / "out", cache_dir=work / "cache")
    return result.artifacts[0].path


@pytest.mark.slow
def test_an_upload_is_every_file_of_the_artifact_with_its_card_and_manifest(artifact):
    with hub() as server:
        address = upload(artifact, "me/tiny", server.server_port)
    written = {str(file.relative_to(artifact)): file.read_bytes() for file in artifact.rglob("*") if file.is_file()}
    assert server.files == written and {"README.md", "manifest.json"} <= written.keys()
    assert address.strip().endswith(f"/me/tiny/commit/{'0' * 40}")
    assert server.tokens == {"Bearer hf_of_me"}
    assert server.created["name"] == "tiny" and "private" in json.dumps(server.created)


@pytest.mark.slow
def test_what_the_hub_does_not_take_is_said_in_its_own_words(artifact):
    with hub(status=403) as server:
        assert "not-uploaded" in (said := upload(artifact, "me/tiny", server.server_port)) and "403" in said
    assert "not-uploaded" in upload(artifact, "me/tiny", server.server_port)  # nobody answers there any more
    assert "not-uploaded" in upload(artifact, "no name/at all/", server.server_port)
    assert "not-uploaded" in upload(artifact, "me/tiny", server.server_port, HF_HUB_OFFLINE="1")


def test_an_artifact_that_was_edited_is_not_uploaded(artifact):
    (artifact / "more.txt").write_text("")
    try:
        with hub() as server:
            said = upload(artifact, "me/tiny", server.server_port)
    finally:
        (artifact / "more.txt").unlink()
    assert "is not in the manifest" in said and not server.files

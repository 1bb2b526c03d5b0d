"""`editor`: a client's session over the pipes of a real `effc lsp` process, one for each file of tests."""

import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

SCRIPT = "import sys; from effc.compiler.cli.main import main; sys.exit(main())"
SECONDS = 60  # in which an answer has to come, on a busy machine


class Editor:
    """Numbers requests, waits for their answers, and keeps what the server publishes."""

    def __init__(self, folder: Path, options: dict[str, Any] | None = None):
        environment = {**os.environ, "EFFC_CACHE_DIR": str(folder / "cache"), "NO_COLOR": "1"}
        command = [sys.executable, "-X", "utf8", "-c", SCRIPT, "lsp"]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.folder, self.number, self.versions = folder, 0, {}
        self.answers: queue.Queue = queue.Queue()
        self.published: dict[str, dict] = {}
        self.told: queue.Queue = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        capabilities = {"workspace": {"inlayHint": {"refreshSupport": True}}}
        begun = {"processId": None, "rootUri": None, "capabilities": capabilities, "initializationOptions": options}
        self.capabilities = self.ask("initialize", begun)["capabilities"]
        self.say("initialized", {})

    def _listen(self) -> None:
        while line := self.process.stdout.readline():
            size = 0
            while line.strip():
                if line.lower().startswith(b"content-length:"):
                    size = int(line.split(b":")[1])
                line = self.process.stdout.readline()
            message = json.loads(self.process.stdout.read(size))
            if "method" not in message:
                self.answers.put(message)
            else:
                self.told.put(message)
                if "id" in message:
                    self.send({"jsonrpc": "2.0", "id": message["id"], "result": None})

    def send(self, message: Any) -> None:
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        self.raw(b"Content-Length: %d\r\n\r\n" % len(body) + body)

    def raw(self, data: bytes) -> None:
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def say(self, method: str, params: Any) -> None:
        self.send({"jsonrpc": "2.0", "method": method, "params": params})

    def answer(self, method: str, params: Any) -> dict:
        self.number += 1
        self.send({"jsonrpc": "2.0", "id": self.number, "method": method, "params": params})
        while True:
            message = self.answers.get(timeout=SECONDS)
            if message.get("id") == self.number:
                return message

    def ask(self, method: str, params: Any = None) -> Any:
        message = self.answer(method, params)
        assert "error" not in message, message["error"]
        return message["result"]

    def heard(self, method: str) -> Any:
        while True:
            message = self.told.get(timeout=SECONDS)
            if message["method"] == method:
                return message.get("params")

    # -- documents -------------------------------------------------------------------------------------------

    def uri(self, name: str) -> str:
        return (self.folder / name).as_uri()

    def open(self, name: str, text: str) -> list[dict]:
        """The diagnostics of a document that is opened with this text."""
        self.versions[name] = 1
        item = {"uri": self.uri(name), "languageId": "effspec", "version": 1, "text": text}
        self.say("textDocument/didOpen", {"textDocument": item})
        return self.diagnostics(name)

    def change(self, name: str, text: str) -> list[dict]:
        self.versions[name] += 1
        document = {"uri": self.uri(name), "version": self.versions[name]}
        self.say("textDocument/didChange", {"textDocument": document, "contentChanges": [{"text": text}]})
        return self.diagnostics(name)

    def show(self, name: str, text: str) -> list[dict]:
        """The diagnostics of a document with this text, which is opened unless it is open."""
        return (self.change if name in self.versions else self.open)(name, text)

    def diagnostics(self, name: str) -> list[dict]:
        while True:
            found = self.heard("textDocument/publishDiagnostics")
            if found["uri"] == self.uri(name) and found.get("version") == self.versions[name]:
                return found["diagnostics"]

    def at(self, method: str, name: str, line: int, character: int, **more: Any) -> Any:
        place = {"textDocument": {"uri": self.uri(name)}, "position": {"line": line, "character": character}}
        return self.ask(f"textDocument/{method}", {**place, **more})

    def of(self, method: str, name: str, **more: Any) -> Any:
        return self.ask(f"textDocument/{method}", {"textDocument": {"uri": self.uri(name)}, **more})

    def end(self) -> int:
        self.ask("shutdown")
        self.say("exit", None)
        return self.process.wait(SECONDS)


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    pytest.importorskip("pygls", reason="the extra `editor` is not installed")
    session = Editor(tmp_path_factory.mktemp("editor"), {"plan": False})
    yield session
    code = session.end()
    assert code == 0, session.process.stderr.read().decode()[-3000:]

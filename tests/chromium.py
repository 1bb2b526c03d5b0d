"""Headless Chromium through its debugging pipe: JSON messages that end in a zero byte, no socket and no package."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BROWSER = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)


@dataclass
class Browser:
    """One page. `events` are all that it told of itself, in order."""

    into: Any
    out: Any
    session: str = ""
    number: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.into.write(json.dumps(message).encode() + b"\0")
        self.into.flush()
        while True:
            said = self._read()
            if said.get("id") == self.number:
                assert "error" not in said, f"{method}: {said['error']}"
                return said["result"]
            self.events.append(said)

    def _read(self) -> dict[str, Any]:
        found = bytearray()
        while (byte := self.out.read(1)) != b"\0":
            assert byte, "the browser has gone"
            found += byte
        return json.loads(found)

    def evaluate(self, script: str) -> Any:
        """What an expression gives, as JSON; a promise is waited for."""
        said = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said.get("exceptionDetails")
        return said["result"].get("value")

    def show(self, page: Path, width: int, scheme: str, height: int = 900) -> None:
        """Open a file in a window of that width, in that colour scheme."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **metrics)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("Page.navigate", url=page.as_uri())
        self.evaluate(
            "new Promise(r => { const f = () => document.readyState === 'complete' && location.protocol === 'file:' ? "
            "r(1) : setTimeout(f, 20); f(); })"
        )

    def summary(self, whole: bool = True) -> bytes:
        said = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(said["data"])

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.ask(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode={"Tab": 9}.get(key, 0)
            )

    def told(self, method: str) -> list[dict[str, Any]]:
        return [e["params"] for e in self.events if e.get("method") == method]


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser with a profile of its own, which ends with the block."""
    assert BROWSER, "there is no Chromium"
    their_in, our_out = os.pipe()
    our_in, their_out = os.pipe()
    with tempfile.TemporaryDirectory(prefix="effc-chromium-", ignore_cleanup_errors=True) as profile:
        command = [
            BROWSER,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            "--hide-scrollbars",
        ]
        command += [f"--user-data-dir={profile}", "--no-first-run", "--disable-background-networking", "about:blank"]
        shuffle = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'  # Chromium wants its pipes there
        with open(os.devnull, "wb") as nothing:
            child = subprocess.Popen(
                ["bash", "-c", shuffle, "bash", str(their_in), str(their_out), *command],
                pass_fds=(their_in, their_out),
                stdout=nothing,
                stderr=nothing,
            )
        os.close(their_in)
        os.close(their_out)
        try:
            with os.fdopen(our_out, "wb") as into, os.fdopen(our_in, "rb") as out:
                browser = Browser(into, out)
                pages = browser.ask("Target.getTargets")["targetInfos"]
                target = next(t["targetId"] for t in pages if t["type"] == "page")
                attached = browser.ask("Target.attachToTarget", targetId=target, flatten=True)
                browser.session = attached["sessionId"]
                for domain in ("Page", "Runtime", "Log", "Network"):
                    browser.ask(f"{domain}.enable")
                yield browser
        finally:
            child.kill()
            child.wait()

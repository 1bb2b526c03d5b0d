"""Hints inside the text: what each step does, from the process that plans, and the defaults of a call."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from lsprotocol import types as lsp

from .open_documents import OpenDocuments, Reading
from .word_pages import parameter_values, plugin_calls

MAX_ITEMS = 3  # defaults of a call; the others are in the tooltip


class Forecasts:
    """Forecasts of the last plan for each text. One process answers, one question at a time, the newest first; it
    starts when it is first asked and ends with the editor."""

    def __init__(self, on_change: Callable[[], None]):
        self.on_change = on_change  # called, from another thread, once there is something new
        self.known: dict[tuple[Path, str], list[dict]] = {}
        self.pending: tuple[Reading, dict[str, str]] | None = None
        self.change = threading.Condition()
        self.process: subprocess.Popen | None = None
        self.thread: threading.Thread | None = None
        self.closed = False

    def known_forecasts(self, reading: Reading) -> list[dict]:
        return self.known.get((reading.path, reading.source.text), [])

    def request_forecast(self, reading: Reading, documents: OpenDocuments) -> None:
        """Plan a sound recipe whose models are known, in its turn."""
        if not reading.recipes or not reading.skeletons or (reading.path, reading.source.text) in self.known:
            return
        with self.change:
            self.pending = (reading, {str(path): text for path, text in documents.texts.items()})
            if self.thread is None:
                self.thread = threading.Thread(target=self._serve_requests, daemon=True)
                self.thread.start()
            self.change.notify()

    def end(self) -> None:
        with self.change:
            self.closed = True
            self.change.notify()
        if self.process:
            self.process.kill()
            self.process.wait()

    def _serve_requests(self) -> None:
        while True:
            with self.change:
                while self.pending is None and not self.closed:
                    self.change.wait()
                if self.closed or self.pending is None:
                    return
                (reading, texts), self.pending = self.pending, None
            answer = self._forecast_steps({"id": 0, "path": str(reading.path), "texts": texts})
            if len(self.known) > 50:
                self.known.clear()
            self.known[reading.path, reading.source.text] = answer
            self.on_change()

    def _forecast_steps(self, request: dict) -> list[dict]:
        if self.process is None or self.process.poll() is not None:
            self.process = _start_forecast_process()
        assert self.process.stdin and self.process.stdout, "the process has pipes"
        try:
            self.process.stdin.write((json.dumps(request) + "\n").encode())
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())["steps"]
        except (OSError, ValueError, KeyError):  # it ended: a recipe that it can't plan has no hints
            return []


def _start_forecast_process() -> subprocess.Popen:
    """Start the forecast process on one thread: what a person types comes first."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "EFFC_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "effc.compiler.cli.editor.forecast"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )


def inlay_hints(
    reading: Reading, forecasts: Forecasts, documents: OpenDocuments, show_defaults: bool
) -> list[lsp.InlayHint]:
    effects = [
        lsp.InlayHint(
            reading.lines.position(step["end"]), step["said"], tooltip="what `effc plan` foresees", padding_left=True
        )
        for step in forecasts.known_forecasts(reading)
        if step["said"]
    ]
    return effects + (_default_hints(reading, documents) if show_defaults else [])


def _default_hints(reading: Reading, documents: OpenDocuments) -> list[lsp.InlayHint]:
    """Parameters that a call leaves out, before its closing parenthesis."""
    result = []
    for call, word in plugin_calls(reading.file, documents.vocabulary):
        left = [f"{name}: {value}" for name, value, is_explicit in parameter_values(word, call) if not is_explicit]
        if left and reading.source.text[call.span.end - 1] == ")":
            ellipsis = ", ..." if len(left) > MAX_ITEMS else ""
            label = (", " if call.args else "") + ", ".join(left[:MAX_ITEMS]) + ellipsis
            position = reading.lines.position(call.span.end - 1)
            result.append(lsp.InlayHint(position, label, lsp.InlayHintKind.Parameter, tooltip="\n".join(left)))
    return result

"""A tokenizer's chat template, rendered in a process of its own: it came with the model, from anybody."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from jinja2 import TemplateError

from ....dsl.syntax.diagnostics import Fault, Reject

bad_template = Fault(
    "bad-chat-template", "The template by which a tokenizer writes conversations can't be used.", exit="environment"
)
SECONDS, TEMPLATE = 3.0, 1 << 20  # of a processor for a conversation; characters of a template


class TooLong(TemplateError):
    """A template that takes more than any conversation needs."""


def render_template(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """The text of a conversation. Raises TemplateError or ValueError where the template refuses it."""
    template = tokenizer.get_chat_template()
    if len(template) > TEMPLATE:
        raise TooLong(f"it has {len(template)} characters")
    if not messages:
        raise ValueError("there are no messages")
    request = {**tokenizer.special_tokens_map, **variables, "chat_template": template, "messages": list(messages)}
    return _renderer().request(request)


def render_template_or_reject(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """Render a conversation by the tokenizer's chat template. Raises Reject (bad-chat-template)."""
    try:
        return render_template(tokenizer, messages, **variables)
    except (TemplateError, ValueError) as error:
        raise Reject(
            bad_template(
                f"the tokenizer's chat template can't be used: {(str(error).splitlines() or ['?'])[0]}",
                help="fetch the tokenizer files again",
            )
        ) from error


class _Renderer:
    """The process that renders for this one, begun at the first conversation, and again after one that ended it."""

    def __init__(self) -> None:
        self.owner = os.getpid()  # a process that was forked off needs one of its own
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None

    def request(self, request: Mapping[str, Any]) -> str:
        line = json.dumps(request, default=str) + "\n"
        with self._lock:
            answer = self._exchange_line(line)
        if "text" in answer:
            return answer["text"]
        raise TemplateError(answer["error"])

    def _exchange_line(self, line: str) -> dict[str, str]:
        process = self._process or self._start_child()
        assert process.stdin and process.stdout, "both are pipes"
        answer = ""
        with suppress(BrokenPipeError):
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        if answer.endswith("\n"):
            return json.loads(answer)
        process.stdin.close()
        self._process = None
        code = process.wait()
        raise TooLong(f"it takes more than {SECONDS:g} s or more memory than there is for it (signal {-code})")

    def _start_child(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-P", str(Path(__file__).with_name("template_child.py")), str(SECONDS)]
        self._process = process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        return process


_cached_renderer: _Renderer | None = None


def _renderer() -> _Renderer:
    global _cached_renderer
    if _cached_renderer is None or _cached_renderer.owner != os.getpid():
        _cached_renderer = _Renderer()
    return _cached_renderer

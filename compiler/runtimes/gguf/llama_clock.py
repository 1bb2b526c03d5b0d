"""Speed of a GGUF file in llama.cpp, in a process of its own: llama.cpp ends a process that it can't go on in."""

import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path

import torch

from ...evaluation.timing import prompt_too_long
from ...plugin.clock import not_timed

_CHILD = Path(__file__).with_name("llama_clock_child.py")
SendRequest = Callable[[dict[str, int | list[int]]], float]
_LEAST = 64  # tokens of a context


class LlamaClock:
    """Times of a GGUF file in llama.cpp, with as many threads as torch has here.

    context   tokens that the model has positions for
    """

    def __init__(self, file: Path, context: int):
        self.file, self.context = file, context

    def make_prefill_step(self, prompt: Sequence[int]) -> Callable[[], float]:
        send = self._spawn_worker(len(prompt))
        return lambda: send({"prompt": list(prompt)})

    def decode_step(self, prompt: Sequence[int], batch: int) -> Callable[[], float]:
        """Decodes tokens of the prompt again: which ones they are changes no time."""
        if batch > 1:
            raise not_timed(f"llama-cpp-python decodes one sequence at a time, and not {batch}").rejection()
        send, tokens = self._spawn_worker(len(prompt)), cycle(prompt)
        send({"prompt": list(prompt)})
        return lambda: send({"token": next(tokens)})

    def _spawn_worker(self, prompt_length: int) -> SendRequest:
        if prompt_length >= self.context:
            raise prompt_too_long(
                f"a prompt of {prompt_length} tokens is timed, and the model has {self.context} positions",
                help=f"set `prompt:` of the measure to less than {self.context}",
            ).rejection()
        if find_spec("llama_cpp") is None:
            raise not_timed(
                "llama.cpp runs a GGUF file, and `llama-cpp-python` is not installed here",
                help='`pip install "effc[llama]"`',
            ).rejection()
        context = min(self.context, max(_LEAST, 2 * prompt_length))
        call = [sys.executable, "-P", str(_CHILD), str(self.file), str(context), str(torch.get_num_threads())]
        process = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        connection = _Connection(process)
        return connection.send


class _Connection:
    """Pipes to a child, which is ended when nobody asks it any more."""

    def __init__(self, process: "subprocess.Popen[bytes]"):
        self.process = process
        weakref.finalize(self, _stop, process)

    def send(self, request: "dict[str, int | list[int]]") -> float:
        assert self.process.stdin is not None and self.process.stdout is not None, "pipes were asked for"
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            raise not_timed(f"llama.cpp ended with status {self.process.wait()} where it was to be timed").rejection()
        return float(answer)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()

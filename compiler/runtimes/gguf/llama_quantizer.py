"""llama.cpp's quantiser, in a process of its own: llama.cpp ends a process that it can't go on in."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from ...core.environment import check_modules, package_missing
from ...core.quantity import size_text
from .number_types import TYPES
from .refusal import incompatible_type, quantizer_killed

_CHILD = Path(__file__).with_name("llama_quantizer_child.py")
_REMEDY = "look at the step that gave these numbers, or write `type: bf16`"


def ggml_library_path() -> Path:
    """ggml's library in the package `llama-cpp-python`. Raises Reject (package-missing)."""
    check_modules(("llama_cpp",), "llama", "llama.cpp's quantiser")
    spec = find_spec("llama_cpp")
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(Path(folders[0], "lib").glob("*ggml-base.*")) if folders else []
    if not files:
        raise package_missing(
            "llama_cpp is installed without ggml's library, which has llama.cpp's quantiser",
            help='pip install --force-reinstall "effc[llama]"',
        ).rejection()
    return files[0]


class LlamaQuantizer:
    """Connection to the process that quantises."""

    def __init__(self, process: "subprocess.Popen[bytes]"):
        self.process = process

    def quantize(self, name: str, matrix: np.ndarray, type_name: str, importance: np.ndarray | None) -> np.ndarray:
        """Bytes of a matrix in a type of GGUF, the same for any number of threads.

        matrix      [n, k] float32
        importance  [k] float32: weights of the columns' squared errors, llama.cpp's importance matrix
        return      [n, bytes of a row] uint8
        Raises Reject (unfit-type, quantiser-killed) where the numbers have no codes of that type.
        """
        if not np.isfinite(matrix).all():  # which llama.cpp rounds without a word
            raise incompatible_type(f"{name} has numbers that are infinite or none", help=_REMEDY).rejection()
        rows, row = matrix.shape
        request = {"type": TYPES[type_name].number, "rows": rows, "row": row, "weighted": importance is not None}
        parts = [matrix, *([] if importance is None else [importance])]
        try:
            raw = self._request(
                json.dumps(request).encode() + b"\n", [np.ascontiguousarray(p, np.float32) for p in parts]
            )
        except BrokenPipeError:
            raw = None
        if raw is None:
            status = self.process.wait()
            if status == -signal.SIGKILL:
                raise quantizer_killed(
                    f"llama.cpp's quantiser was killed over {name} in `{type_name}`, most likely for want of memory: "
                    f"it holds {size_text(3 * matrix.nbytes)} for this matrix",
                    help="close other programs, or compile with fewer threads",
                ).rejection()
            raise incompatible_type(
                f"llama.cpp's quantiser ended with status {status} over {name} in `{type_name}`", help=_REMEDY
            ).rejection()
        if not raw:
            raise incompatible_type(f"{name} has numbers that `{type_name}` has no codes for", help=_REMEDY).rejection()
        return np.frombuffer(raw, np.uint8).reshape(rows, -1)

    def _request(self, header: bytes, arrays: list[np.ndarray]) -> bytes | None:
        """The answer's bytes; None where the process has ended."""
        assert self.process.stdin is not None and self.process.stdout is not None, "both are pipes"
        self.process.stdin.write(header)
        for part in arrays:
            self.process.stdin.write(part.data)
        self.process.stdin.flush()
        count = self.process.stdout.readline()
        if not count:
            return None
        raw = self.process.stdout.read(int(count))
        return raw if len(raw) == int(count) else None


@contextmanager
def running_llama_quantizer() -> Iterator[LlamaQuantizer]:
    """Start the process, with as many threads as torch has here. Raises Reject (package-missing)."""
    call = [sys.executable, "-P", str(_CHILD), str(ggml_library_path()), str(torch.get_num_threads())]
    process = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        yield LlamaQuantizer(process)
    finally:
        process.kill()
        process.communicate()

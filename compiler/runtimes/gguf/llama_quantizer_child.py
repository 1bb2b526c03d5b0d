"""llama.cpp's quantiser of matrices. Run by path, in a process of its own; imports nothing of effc, and ends with its
stdin.

A request is a JSON line {"type": number, "rows": count, "row": numbers of a row, "weighted": whether columns have
weights}, the matrix in float32, and the weights in float32. The answer is the number of bytes of the quantised matrix
in a line, 0 where ggml finds numbers in it that are none, and these bytes.
"""

import ctypes
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_NUMBERS = 1 << 18  # that a thread rounds at once


class InitParams(ctypes.Structure):
    """`ggml_init_params`"""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def load_ggml(library: str) -> Any:
    """ggml's functions, with its tables of halves filled, as `llama_backend_init` does that."""
    ggml = ctypes.CDLL(library)
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    ggml.ggml_init.argtypes, ggml.ggml_init.restype = [InitParams], pointer
    ggml.ggml_free.argtypes, ggml.ggml_free.restype = [pointer], None
    ggml.ggml_row_size.argtypes, ggml.ggml_row_size.restype = [ctypes.c_int, number], ctypes.c_size_t
    ggml.ggml_quantize_init.argtypes, ggml.ggml_quantize_init.restype = [ctypes.c_int], None
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_validate_row_data.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t]
    ggml.ggml_validate_row_data.restype = ctypes.c_bool
    ggml.ggml_free(ggml.ggml_init(InitParams(0, None, False)))
    return ggml


def read_floats(stream: Any, count: int) -> Any:
    floats = (ctypes.c_float * count)()
    stream.readinto(floats)  # returns once all are there
    return floats


def quantize(ggml: Any, pool: ThreadPoolExecutor, request: dict[str, Any], stream: Any) -> Any:
    """Bytes of the matrix, as a ctypes array; empty where its numbers have no codes."""
    kind, rows, row = request["type"], request["rows"], request["row"]
    numbers = read_floats(stream, rows * row)
    weights = read_floats(stream, row) if request["weighted"] else None
    quantized = (ctypes.c_ubyte * (rows * ggml.ggml_row_size(kind, row)))()
    ggml.ggml_quantize_init(kind)
    step = max(1, _NUMBERS // row)

    def quantize_rows(first: int) -> None:
        count = min(step, rows - first)
        ggml.ggml_quantize_chunk(kind, numbers, quantized, first * row, count, row, weights)

    list(pool.map(quantize_rows, range(0, rows, step)))
    return quantized if ggml.ggml_validate_row_data(kind, quantized, len(quantized)) else b""


def main(library: str, threads: str) -> None:
    ggml, requests, answers = load_ggml(library), sys.stdin.buffer, sys.stdout.buffer
    with ThreadPoolExecutor(int(threads)) as pool:
        while line := requests.readline():
            quantized = quantize(ggml, pool, json.loads(line), requests)
            answers.write(b"%d\n" % len(quantized))
            answers.write(quantized)
            answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])

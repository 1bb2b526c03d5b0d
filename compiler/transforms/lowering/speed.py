"""Times of candidates for a linear module: raced here, read from a record, or estimated for another machine."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....dsl.syntax.diagnostics import Fault, Reject
from ....kernels import levels
from ...core.safe_read import MALFORMED, MANIFEST, read_json
from .contenders import EAGER, kernel_contender, torch_contenders
from .racing import race

bad_timings = Fault(
    "bad-timings", "A file of timings can't be read, or lacks a shape that a model has.", exit="environment"
)

SECONDS = 0.1  # of racing, for each contender
STEP = 0.05  # sparsities that differ less are one case
INT8 = ("dense_linear_int8", "sparse_linear_int8")
INT8_INT16 = ("dense_linear_int8_int16",)
INT4 = ("dense_linear_int4",)
ROUNDED = (*INT8, *INT8_INT16, *INT4)  # kernels that put weights on grids of few values

CALL = 4e-6
TWO_LINES = 2.0  # times the products of one; with VNNI, where a vector is loaded once for both, 1.4 for a single row


@dataclass(frozen=True)
class ThreadRates:
    """Rates of a thread at a level, from which times of other machines are estimated.

    Other machines differ by their clock and memory, less by what is faster than what.
    """

    read: float  # bytes per second
    torch_read: Mapping[int, float]  # what torch gets of them for one row, by bytes of an element
    each: Mapping[str, float]  # nanoseconds that 32 weights take a kernel where memory is no limit
    blocks: tuple[float, float]  # of block_sparse_linear: least, and what all blocks kept take more
    rows: int = 2  # that take no longer than one
    torch_rows: int = 16


def _zen4_rates(bf16: tuple[float, float], int8: tuple[float, float], blocks: tuple[float, float]) -> ThreadRates:
    """Of a Zen 4 (EPYC, 3.7 GHz), kernels held to a level: dense and sparse. int4 has the products of int8, inputs of
    16 bits those of two rows.
    """
    names = ("dense_linear", "sparse_linear", "dense_linear_int8", "sparse_linear_int8", *INT4, *INT8_INT16)
    each = (*bf16, *int8, int8[0], TWO_LINES * int8[0])
    return ThreadRates(26e9, {2: 7.5e9, 4: 9.3e9}, dict(zip(names, each, strict=True)), blocks)


PACES = {
    "portable": _zen4_rates((3.5, 14.9), (18.9, 30.4), (0.5, 3.2)),
    "avx2": _zen4_rates((1.2, 2.1), (1.3, 2.5), (0.4, 0.85)),
    "avx512": _zen4_rates((1.0, 1.2), (0.85, 1.1), (0.4, 0.65)),
    "avx512_bf16": _zen4_rates((0.85, 1.1), (0.6, 0.76), (0.4, 0.57)),
    # Of a Xeon (3.6 GHz); `bench/pace.py` prints it.
    "amx": ThreadRates(
        read=15e9,
        torch_read={2: 7.5e9, 4: 12e9},
        each={
            "dense_linear": 0.73,
            "sparse_linear": 1.2,
            "dense_linear_int8": 0.24,
            "sparse_linear_int8": 0.48,
            "dense_linear_int4": 0.3,
            "dense_linear_int8_int16": 0.24,  # not measured: a tile has room for both lines of eight rows
        },
        blocks=(0.01, 0.8),
        rows=12,
        torch_rows=100,
    ),
}


@dataclass(frozen=True)
class KernelCase:
    """Linear modules that take equally long: shape, dtype, shares of zeros and of blocks that are all zero."""

    n: int
    k: int
    dtype: str
    zeros: float
    blocks: float

    @staticmethod
    def of(weight: Tensor, zeros: float, blocks: float) -> "KernelCase":
        def nearest(share: float) -> float:
            return round(round(share / STEP) * STEP, 2)

        n, k = weight.shape
        return KernelCase(n, k, str(weight.dtype).removeprefix("torch."), nearest(zeros), nearest(blocks))

    @property
    def name(self) -> str:
        blocks_text = f", {self.blocks:.0%} of blocks" if self.blocks else ""
        return f"{self.n} x {self.k} {self.dtype}, {self.zeros:.0%} zeros{blocks_text}"

    def to_json(self) -> dict[str, Any]:
        return {"n": self.n, "k": self.k, "dtype": self.dtype, "zeros": self.zeros, "blocks": self.blocks}


def race_kernels(weight: Tensor, kernels: Sequence[str], rows: int, isa: str) -> dict[str, float]:
    """Seconds of torch's contenders and of the kernels, by name."""
    x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    with torch.inference_mode(), nullcontext() if isa == "native" else levels.force_level(isa):
        contenders = [*torch_contenders(weight, x), *(kernel_contender(kernel, weight, x) for kernel in kernels)]
        race(contenders, SECONDS)
    return {c.name: c.seconds for c in contenders}


def estimate_seconds(case: KernelCase, sizes: Mapping[str, int], rows: int, isa: str, threads: int) -> dict[str, float]:
    """Seconds on a machine with that level and so many cores, from bytes and from what expanding them takes.

    sizes   kernel -> bytes of the packed weight
    """
    pace = PACES.get(isa, PACES["avx512_bf16"])
    width = 4 if case.dtype == "float32" else 2
    read = case.n * case.k * width / (pace.torch_read[width] * threads)
    seconds = {EAGER: CALL + read * max(1.0, rows / pace.torch_rows)}
    for kernel, size in sizes.items():
        least, per_block = pace.blocks
        each = pace.each.get(kernel, least + per_block * (1 - case.blocks))
        work = case.n * case.k / 32 * each * 1e-9 * max(1.0, rows / pace.rows)
        seconds[kernel] = CALL + max(size / pace.read, work) / threads
    return seconds


def read_recorded_seconds(file: Path, cases: Sequence[KernelCase]) -> dict[KernelCase, dict[str, float]]:
    """Seconds of every case from a file: a manifest of what was compiled there, or its timings alone."""
    try:
        entries = list(_find_timings(read_json(file, MANIFEST)))
        known = {
            KernelCase(**{name: e[name] for name in ("n", "k", "dtype", "zeros", "blocks")}): {
                str(name): float(s) for name, s in e["seconds"].items()
            }
            for e in entries
        }
    except (OSError, *MALFORMED) as error:
        raise Reject(
            bad_timings(
                f"{file} holds no timings that can be read",
                note=str(error)[:200],
                help="give the manifest.json of what was lowered on that machine",
            )
        ) from error
    missing = [case for case in cases if EAGER not in known.get(case, {})]
    if missing:
        raise Reject(
            bad_timings(
                f"{file} has no timing of {missing[0].name}",
                help="lower this very model on that machine once, and take its manifest.json",
            )
        )
    return {case: known[case] for case in cases}


def _find_timings(value_json: Any) -> Iterator[dict[str, Any]]:
    """All lists called "timings" inside of JSON."""
    if isinstance(value_json, dict):
        yield from value_json["timings"] if isinstance(value_json.get("timings"), list) else ()
        for name, value in value_json.items():
            if name != "timings":
                yield from _find_timings(value)
    elif isinstance(value_json, list):
        for value in value_json:
            yield from _find_timings(value)

"""How long candidates for a linear module take: raced here, read from a record, or reckoned for elsewhere."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...dsl.diagnostics import Fault, Reject
from ...kernels import levels
from ..store.regular import MANIFEST, MISFIT, read_json
from .contenders import EAGER, of_torch, ours
from .racing import race

bad_timings = Fault(
    "bad-timings", "A file of timings can't be read, or lacks a shape that a model has.", exit="environment"
)

SECONDS = 0.1  # of racing, for each contender
STEP = 0.05  # sparsities that differ less are one case
INT8 = ("dense_linear_int8", "sparse_linear_int8")
INT4 = ("dense_linear_int4",)
ROUNDED = (*INT8, *INT4)  # kernels that put weights on grids of few values

# Reckoned: bytes a thread reads per second, and nanoseconds that 32 weights take a thread where memory is no
# limit. Measured on a Zen 4 (EPYC, 3.7 GHz), kernels held to each level. Other machines differ by their clock
# and memory, less by what is faster than what.
READ = 26e9
TORCH_READ = {2: 7.5e9, 4: 9.3e9}  # one row: what torch gets of it, by bytes of an element
CALL = 4e-6
_ORDER = ("dense_linear", "sparse_linear", "dense_linear_int8", "sparse_linear_int8")
NANOSECONDS = {
    level: dict(zip(_ORDER, times, strict=True))
    for level, times in {
        "portable": (3.5, 14.9, 18.9, 30.4),
        "avx2": (1.2, 2.1, 1.3, 2.5),
        "avx512": (1.0, 1.2, 0.85, 1.1),
        "avx512_bf16": (0.85, 1.1, 0.6, 0.76),
    }.items()
}
# Of block_sparse_linear: (least, and what all blocks kept take more).
BLOCKS = {"portable": (0.5, 3.2), "avx2": (0.4, 0.85), "avx512": (0.4, 0.65), "avx512_bf16": (0.4, 0.57)}


@dataclass(frozen=True)
class Case:
    """Linear modules that take equally long: shape, dtype, shares of zeros and of blocks that are all zero."""

    n: int
    k: int
    dtype: str
    zeros: float
    blocks: float

    @staticmethod
    def of(weight: Tensor, zeros: float, blocks: float) -> "Case":
        def near(share: float) -> float:
            return round(round(share / STEP) * STEP, 2)

        return Case(*weight.shape, str(weight.dtype).removeprefix("torch."), near(zeros), near(blocks))

    @property
    def name(self) -> str:
        rest = f", {self.blocks:.0%} of blocks" if self.blocks else ""
        return f"{self.n} x {self.k} {self.dtype}, {self.zeros:.0%} zeros{rest}"

    def to_json(self) -> dict[str, Any]:
        return {"n": self.n, "k": self.k, "dtype": self.dtype, "zeros": self.zeros, "blocks": self.blocks}


def raced(weight: Tensor, kernels: Sequence[str], rows: int, isa: str) -> dict[str, float]:
    """Seconds of torch's contenders and of the kernels, by name."""
    x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    with torch.inference_mode(), nullcontext() if isa == "native" else levels.forced(isa):
        contenders = [*of_torch(weight, x), *(ours(kernel, weight, x) for kernel in kernels)]
        race(contenders, SECONDS)
    return {c.name: c.seconds for c in contenders}


def reckoned(case: Case, sizes: Mapping[str, int], rows: int, isa: str, threads: int) -> dict[str, float]:
    """Seconds on a machine with that level and so many cores, from bytes and from what expanding them takes.

    sizes   kernel -> bytes of the packed weight
    """
    level = isa if isa in NANOSECONDS else "avx512_bf16"  # a row at a time AMX's instructions gain nothing
    width = 4 if case.dtype == "float32" else 2
    found = {EAGER: CALL + case.n * case.k * width / (TORCH_READ[width] * threads) * max(1.0, rows / 16)}
    for kernel, size in sizes.items():
        least, more = BLOCKS[level]
        known = NANOSECONDS[level] | dict.fromkeys(INT4, NANOSECONDS[level]["dense_linear_int8"])  # its products
        each = known.get(kernel, least + more * (1 - case.blocks))
        work = case.n * case.k / 32 * each * 1e-9 * max(1.0, rows / 2)
        found[kernel] = CALL + max(size / READ, work) / threads
    return found


def recorded(file: Path, cases: Sequence[Case]) -> dict[Case, dict[str, float]]:
    """Seconds of every case from a file: a manifest of what was compiled there, or its timings alone."""
    try:
        entries = list(_timings(read_json(file, MANIFEST)))
        known = {
            Case(**{name: e[name] for name in ("n", "k", "dtype", "zeros", "blocks")}): {
                str(name): float(s) for name, s in e["seconds"].items()
            }
            for e in entries
        }
    except (OSError, *MISFIT) as error:
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


def _timings(found: Any) -> Iterator[dict[str, Any]]:
    """All lists called "timings" inside of JSON."""
    if isinstance(found, dict):
        yield from found["timings"] if isinstance(found.get("timings"), list) else ()
        for name, value in found.items():
            if name != "timings":
                yield from _timings(value)
    elif isinstance(found, list):
        for value in found:
            yield from _timings(value)

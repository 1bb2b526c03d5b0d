"""Times of candidates for a linear module: raced here, read from a record, or estimated for another machine."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....dsl.syntax.diagnostics import Fault
from ....kernels import levels
from ...core.json_errors import reject_on_error
from ...core.safe_read import MANIFEST, read_json
from ...ir.layers.number_formats import BY_KERNEL, NUMBER_FORMATS
from .contenders import EAGER, available_torch_contenders, kernel_contender
from .racing import race_and_record_times

invalid_timings = Fault(
    "bad-timings", "A file of timings can't be read, or lacks a shape that a model has.", exit="environment"
)

no_rates = Fault(
    "no-rates",
    "Times on another machine are estimated from rates of its level of instruction sets, which effc lacks for one.\n\n"
    "Compile on such a machine, or give `timings` that were measured there.",
    exit="environment",
)

SECONDS = 0.1  # of racing, for each contender
STEP = 0.05  # sparsities that differ less are one case
ROUNDED = tuple(f.kernel for f in NUMBER_FORMATS if f.grid)  # kernels that put weights on grids of few values

CALL = 4e-6


@dataclass(frozen=True)
class ThreadRates:
    """Rates of a thread at a level, from which times of other machines are estimated; the formats have their kernels'.

    torch_read   bytes per second of what torch reads for one row, by bytes of an element
    Other machines differ by their clock and memory, less by what is faster than what.
    """

    read: float = 26e9  # bytes per second
    torch_read: Mapping[int, float] = field(default_factory=lambda: {2: 7.5e9, 4: 9.3e9})
    rows: int = 2  # that take no longer than one
    torch_rows: int = 16


ZEN = ThreadRates()
PACES = dict.fromkeys(("portable", "avx2", "avx512", "avx512_bf16"), ZEN) | {
    "amx": ThreadRates(read=15e9, torch_read={2: 7.5e9, 4: 12e9}, rows=12, torch_rows=100)  # of a Xeon
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
    def of(weight: Tensor, zero_share: float, zero_block_share: float) -> "KernelCase":
        def nearest(share: float) -> float:
            return round(round(share / STEP) * STEP, 2)

        n, k = weight.shape
        return KernelCase(
            n, k, str(weight.dtype).removeprefix("torch."), nearest(zero_share), nearest(zero_block_share)
        )

    @property
    def name(self) -> str:
        blocks_text = f", {self.blocks:.0%} of blocks" if self.blocks else ""
        return f"{self.n} x {self.k} {self.dtype}, {self.zeros:.0%} zeros{blocks_text}"

    def to_json(self) -> dict[str, Any]:
        return {"n": self.n, "k": self.k, "dtype": self.dtype, "zeros": self.zeros, "blocks": self.blocks}


def race_kernels_and_torch(weight: Tensor, kernels: Sequence[str], row_count: int, isa_level: str) -> dict[str, float]:
    """Seconds of torch's contenders and of the kernels, by name."""
    x = torch.randn(row_count, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    with torch.inference_mode(), nullcontext() if isa_level == "native" else levels.at_forced_level(isa_level):
        contenders = [
            *available_torch_contenders(weight, x),
            *(kernel_contender(kernel, weight, x) for kernel in kernels),
        ]
        race_and_record_times(contenders, SECONDS)
    return {c.name: c.seconds for c in contenders}


def estimate_seconds_by_contender(
    case: KernelCase, packed_bytes_by_kernel: Mapping[str, int], row_count: int, isa_level: str, threads: int
) -> dict[str, float]:
    """Seconds on a machine with that level and so many cores, from bytes and from what expanding them takes.

    packed_bytes_by_kernel   kernel -> bytes of the packed weight
    """
    level = levels.active_level() if isa_level == "native" else isa_level
    if level not in PACES:
        raise no_rates(
            f"kernels of {level} were measured on no machine, so their times can't be estimated",
            help="give `timings` from a machine that has it, or name a `format`",
        ).rejection()
    pace = PACES[level]
    width = 4 if case.dtype == "float32" else 2
    read = case.n * case.k * width / (pace.torch_read[width] * threads)
    seconds = {EAGER: CALL + read * max(1.0, row_count / pace.torch_rows)}
    for kernel, size in packed_bytes_by_kernel.items():
        each = BY_KERNEL[kernel].nanoseconds[level]
        if isinstance(each, tuple):
            each = each[0] + each[1] * (1 - case.blocks)
        work = case.n * case.k / 32 * each * 1e-9 * max(1.0, row_count / pace.rows)
        seconds[kernel] = CALL + max(size / pace.read, work) / threads
    return seconds


def read_seconds_of_all_cases(file: Path, cases: Sequence[KernelCase]) -> dict[KernelCase, dict[str, float]]:
    """Seconds of every case from a file: a manifest of what was compiled there, or its timings alone."""
    with reject_on_error(
        invalid_timings,
        f"{file} holds no timings that can be read",
        "give the manifest.json of what was lowered on that machine",
    ):
        entries = list(_find_timing_entries(read_json(file, MANIFEST)))
        known = {
            KernelCase(**{name: e[name] for name in ("n", "k", "dtype", "zeros", "blocks")}): {
                str(name): float(s) for name, s in e["seconds"].items()
            }
            for e in entries
        }
    missing = [case for case in cases if EAGER not in known.get(case, {})]
    if missing:
        raise invalid_timings(
            f"{file} has no timing of {missing[0].name}",
            help="lower this very model on that machine once, and take its manifest.json",
        ).rejection()
    return {case: known[case] for case in cases}


def _find_timing_entries(json_value: Any) -> Iterator[dict[str, Any]]:
    """All lists called "timings" inside of JSON."""
    if isinstance(json_value, dict):
        yield from json_value["timings"] if isinstance(json_value.get("timings"), list) else ()
        for name, value in json_value.items():
            if name != "timings":
                yield from _find_timing_entries(value)
    elif isinstance(json_value, list):
        for value in json_value:
            yield from _find_timing_entries(value)

"""Speeds of this machine for estimates: measured once and stored, or probed for a moment.

Each speed is the best of several tries, by the seconds of processors that they took: what else runs on the machine is
left out as far as it can be, and an estimate made of them is of an idle machine.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS, WIDE = 256, 1024  # of the products that are timed: a batch of tokens, a layer
BYTES = 16 << 20
DISK, START = 200e6, 6.0  # bytes a second and seconds, until they are measured


@dataclass(frozen=True)
class Speeds:
    """Per second: operations of products in three types, bytes and numbers of everything else.

    read     bytes of weights that a product with one row reads
    look     numbers whose extremes are found, as every weight's are once it is loaded
    select   numbers among which a threshold is found
    sort     numbers sorted in groups of four
    pack     numbers packed for a kernel
    grid     numbers for whose groups the best scales of four bits are searched
    hash     bytes
    disk     bytes written and synced
    start    seconds until a fresh process has its libraries
    measured whether `effc doctor --measure` did it; else disk and start are guessed
    """

    float32: float
    bfloat16: float
    float64: float
    read: float
    look: float
    select: float
    sort: float
    pack: float
    grid: float
    hash: float
    disk: float = DISK
    start: float = START
    measured: bool = False

    def matmul_speed(self, dtype: str) -> float:
        return {"bfloat16": self.bfloat16, "float16": self.bfloat16, "float64": self.float64}.get(dtype, self.float32)

    def seconds(self, amount_by_speed: Mapping[str, float]) -> float:
        """Of amounts by the names of speeds; "seconds" are themselves."""
        return sum(
            amount if name == "seconds" else amount / getattr(self, name) for name, amount in amount_by_speed.items()
        )


def measure_machine_speeds(folder: Path | None = None, seconds_each: float = 0.02) -> Speeds:
    """Measure for about so many seconds each; disk and a fresh process too where a folder to write to is given."""
    import torch

    threads = torch.get_num_threads()
    measured: dict[str, Any] = {}
    for name, (amount, call) in _speed_probes_with_work().items():
        measured[name] = amount / (_fastest_call_seconds(call, seconds_each) / (threads if name in _PARALLEL else 1))
    if folder is None:
        return Speeds(**measured)
    disk = BYTES / _fastest_call_seconds(lambda: _write_probe_file(folder), seconds_each, time.perf_counter)
    return Speeds(
        **measured,
        disk=disk,
        start=_fastest_call_seconds(_run_import_process, 0.0, _cpu_seconds_of_children),
        measured=True,
    )


_PARALLEL = ("float32", "bfloat16", "float64", "read", "pack", "grid")  # what all threads do together


def _fastest_call_seconds(
    call: Callable[[], object], min_total_seconds: float, clock: Callable[[], float] = time.process_time
) -> float:
    """The least that a call took by a clock: of two at least, and of as many as there is time for."""
    call()
    best, until = float("inf"), time.perf_counter() + min_total_seconds
    while best == float("inf") or time.perf_counter() < until:
        start = clock()
        call()
        best = min(best, max(clock() - start, 1e-9))
    return best


def _cpu_seconds_of_children() -> float:
    """Seconds of processors that processes took which were waited for."""
    used = os.times()
    return used.children_user + used.children_system


def _speed_probes_with_work() -> dict[str, tuple[float, Callable[[], object]]]:
    """Probe of each speed: the amount of work and the function that does it."""
    import numpy as np
    import torch

    from ...kernels.grid import Grid

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDE, WIDE, generator=generator)
    rows, one = torch.randn(ROWS, WIDE, generator=generator), torch.randn(1, WIDE, generator=generator)
    long = torch.randn(8 * WIDE, WIDE, generator=generator).bfloat16()
    half, halves, single = weight.bfloat16(), rows.bfloat16(), one.bfloat16()
    wide, wides, score = weight.double(), rows.double(), weight.abs()
    data = bytes(BYTES)
    flops, count = 2.0 * ROWS * WIDE * WIDE, float(WIDE * WIDE)

    def select() -> object:  # as transforms/search/masks.py does, which lies above: few are near a threshold
        flat = long.view(torch.int16).numpy().reshape(-1) & np.int16(0x7FFF)
        low, high = np.percentile(flat[:: flat.size // (1 << 16)], (48, 52)).astype(np.int16)
        nearby = flat >= low
        nearby &= flat <= high
        keep = flat >= np.partition(flat[nearby], np.count_nonzero(nearby) // 2)[np.count_nonzero(nearby) // 2]
        np.flatnonzero(flat == low)
        return np.count_nonzero(long.view(torch.int16).numpy().reshape(-1) * keep.view(np.int8))

    def pack() -> object:
        from ...kernels import packed
        from ...kernels.native import KernelError

        try:
            return packed.pack("dense_linear", half)
        except KernelError:  # no compiled kernels here
            return half.clone()

    return {
        "float32": (flops, lambda: rows @ weight),
        "bfloat16": (flops, lambda: halves @ half),
        "float64": (flops, lambda: wides @ wide),
        "read": (float(long.nbytes), lambda: torch.nn.functional.linear(single, long)),
        "look": (count, half.aminmax),
        "select": (float(long.numel()), select),
        "sort": (count, lambda: score.reshape(-1, 4).argsort(dim=1, stable=True)),
        "pack": (count, pack),
        "grid": (count / 8, lambda: Grid(4, 64, True, True).fit_scales(weight[: WIDE // 8])),
        "hash": (float(BYTES), lambda: hashlib.sha256(data).digest()),
    }


def _write_probe_file(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(bytes(BYTES))
        file.flush()
        os.fsync(file.fileno())


def _run_import_process() -> None:
    subprocess.run([sys.executable, "-P", "-c", "import torch, transformers"], check=True, capture_output=True)

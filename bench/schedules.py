"""Work that each thread of the engine has of a step, counted from the engine's own sources: which tasks a level has and
how many bytes of a weight are whose is what schedule.cc and share.h say (schedules.cc is built with them), rows, heads and
blocks of the cache are divided as turn.cc, gemm.h (its tiles) and attention.cc do.
"""

import ctypes
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from effc.kernels import levels
from effc.kernels.engine import SPENT
from effc.kernels.engine_plan import check_plan_and_weights
from effc.kernels.engine_steps import Plan, Slot, Step, Weight

from bench.engine import Shape

LOT, BLOCK, TILE = 16, 32, 16  # rows that are prepared together, of a block of the cache, and of a tile
ROWS_OF_THREAD = 128  # `kRowsOfThread` of turn.cc


def library() -> ctypes.CDLL:
    root = Path(__file__).resolve().parents[1]
    sources = [
        root / "bench" / "schedules.cc",
        *(root / "kernels/src/engine" / f"{n}.cc" for n in ("schedule", "threads")),
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "schedules.so")
        subprocess.run(["c++", "-std=c++17", "-O2", "-shared", "-fPIC", "-pthread", *sources, "-o", path], check=True)
        loaded = ctypes.CDLL(str(path))
    loaded.schedule_tasks.restype = ctypes.c_int64
    loaded.schedule_tasks.argtypes = (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p)
    loaded.share_bytes.argtypes = (ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p)
    for name in ("barrier_seconds", "line_seconds"):
        function = getattr(loaded, name)
        function.restype, function.argtypes = ctypes.c_double, (ctypes.c_int64,)
    return loaded


@dataclass(frozen=True)
class Work:
    """What each thread has of a task, in units of its kind."""

    kind: str
    level: int
    units: list[float]
    bytes: float = 0.0  # of weights, all threads together


@dataclass(frozen=True)
class Call:
    """Tokens of one sequence, behind others."""

    rows: int
    past: int

    @property
    def mirrored(self) -> bool:
        return self.rows <= 4  # `kMirroredRows` of engine.h


def share_of_each_thread(count: int, threads: int) -> list[int]:
    return [count * (part + 1) // threads - count * part // threads for part in range(threads)]


class Schedules:
    """Tasks of a shape's steps, and who has which part of them."""

    def __init__(self, shape: Shape, library: ctypes.CDLL):
        self.library, self.weights = library, shape.weights
        self.layout = check_plan_and_weights(shape.plan, shape.weights)
        self._shares: dict[tuple[int, int], list[int]] = {}

    def tasks(self, threads: int, mirrored: bool) -> list[tuple[str, Step, int, bool]]:
        """Kind of work, step, level, and whether only rows whose logits are wanted have it."""
        layout = self.layout
        rows = [
            (kind * len(values))(*values)
            for kind, values in (
                (Step, layout.steps), (ctypes.c_int32, layout.widths), (Weight, layout.weights), (Slot, layout.slots)
            )
        ]  # fmt: skip
        plan = Plan(
            *rows, *map(len, rows), layout.logits, levels.active_level_code(), threads, 1, 0, 0, layout.context, None
        )
        count = self.library.schedule_tasks(ctypes.byref(plan), int(mirrored), 0, None)
        numbers = (ctypes.c_int32 * 4 * count)()
        self.library.schedule_tasks(ctypes.byref(plan), int(mirrored), count, numbers)
        return [(SPENT[work], layout.steps[step], level, bool(tail)) for work, step, level, tail in numbers]

    def work(self, call: Call, threads: int) -> list[Work]:
        return [
            self._shared_work(kind, step, level, Call(1, call.past + call.rows - 1) if tail else call, call, threads)
            for kind, step, level, tail in self.tasks(threads, call.mirrored)
        ]

    def _shared_work(self, work_kind: str, step: Step, level: int, call: Call, whole_call: Call, threads: int) -> Work:
        rows, alone = call.rows, "" if call.rows > 1 else " of one row"
        if work_kind == "rows":
            width = self.layout.widths[step.to]
            shares = [rows] * threads if whole_call.mirrored else share_of_each_thread(rows, threads)
            return Work(work_kind + alone, level, [width * share for share in shares])
        if work_kind in ("prepare", "multiply"):
            return self._product(work_kind, step, level, rows, whole_call, threads)
        heads = step.kv_heads
        if work_kind == "append":
            first, last = call.past // TILE, (call.past + rows - 1) // TILE
            count = heads * (last - first + 1)
            return Work(work_kind + alone, level, [len(range(part, count, threads)) for part in range(threads)])
        blocks = list(self._attended(step, call))
        count = sum(blocks)
        shares = share_of_each_thread(count, min(threads, count))
        return Work(work_kind + alone, level, [*shares, *[0] * (threads - len(shares))])

    @staticmethod
    def _attended(step: Step, call: Call) -> Iterator[int]:
        """Blocks of the cache that each item of attention.cc sees."""
        group = step.heads // step.kv_heads
        for first in range(0, call.rows * group, TILE):
            token = (min(first + TILE, call.rows * group) - 1) // group
            yield step.kv_heads * -(-(call.past + token + 1) // BLOCK)

    def _product(self, work_kind: str, step: Step, level: int, rows: int, whole_call: Call, threads: int) -> Work:
        weight = self.layout.weights[step.weight]
        by_rows = threads > 1 and not whole_call.mirrored and rows >= ROWS_OF_THREAD * threads
        ends = [rows * part // threads // LOT * LOT for part in range(threads)] + [rows]
        of_thread = [after - before for before, after in pairwise(ends)]
        alone = "" if rows > 1 else " of one row"
        if work_kind == "prepare":
            lots = [min(rows, LOT) * share for share in share_of_each_thread(-(-rows // LOT), threads)]
            shares = [rows] * threads if whole_call.mirrored else of_thread if by_rows else lots
            return Work(work_kind + alone, level, [weight.k * share for share in shares])
        if by_rows:  # each thread reads all of it, from the cache that they share where others have read it
            return Work(work_kind + alone, level, [weight.bytes * share for share in of_thread], weight.bytes)
        shares = self._bytes(weight, threads)
        return Work(work_kind + alone, level, [rows * share for share in shares], sum(shares))

    def _bytes(self, weight: Weight, threads: int) -> list[int]:
        key = (weight.at, threads)
        if key not in self._shares:
            numbers = (ctypes.c_int64 * threads)()
            self.library.share_bytes(ctypes.c_void_p(weight.at), threads, numbers)
            self._shares[key] = list(numbers)
        return self._shares[key]

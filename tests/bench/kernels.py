"""Kernels against their targets, as ratios of interleaved calls in one process with cold weights.

    python tests/bench/kernels.py [--only gemv,rows,prefill,pack] [--seconds 1.5] [--threads 2] [--quick]

Every contender of a line is called in turn, in alternating order, over copies of its weights that together exceed
the last cache, so that each call reads memory. A sample counts if no thread of this process was pre-empted in it
(`ru_nivcsw`); the others are thrown away and counted. Bursts are short, with real-time priority where the system
allows, and other work gets as long in between. Times on a shared machine are noise: only ratios of one line count,
and the read bound measured inside that line.
"""

import argparse
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from effc.compiler.environment import processor_name
from effc.kernels import levels, native, packed
from effc.kernels.ops import KERNELS
from torch.nn.functional import linear

COLD = 160 << 20          # bytes of copies that are cycled through
BURST = 0.05              # seconds of one burst


@dataclass
class Contender:
    """Something timed: one callable per copy of its weights, and the bytes that one call must read."""

    name: str
    calls: list[Callable[[], object]]
    bytes: int = 0
    kept: list[float] = field(default_factory=list)
    thrown: int = 0

    @property
    def seconds(self) -> float:
        return statistics.median(self.kept)


def preempted() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def real_time(on: bool) -> bool:
    """Raise or lower all threads of this process; false where the system does not allow it."""
    policy, parameter = (os.SCHED_FIFO, os.sched_param(1)) if on else (os.SCHED_OTHER, os.sched_param(0))
    try:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setscheduler(int(thread), policy, parameter)
    except (OSError, AttributeError):
        return False
    return True


def race(contenders: list[Contender], seconds: float, allow_real_time: bool) -> None:
    """Call all in turn until each was called for its share of `seconds`."""
    for c in contenders:
        c.calls[0]()
    turn, until = 0, time.perf_counter() + seconds * len(contenders) * 8
    busy = 0.0
    while (busy < seconds * len(contenders) and time.perf_counter() < until) or turn < 6:
        raised = allow_real_time and real_time(True)
        begun = time.perf_counter()
        while time.perf_counter() - begun < BURST:
            for c in contenders if turn % 2 else contenders[::-1]:
                call = c.calls[turn % len(c.calls)]
                before, start = preempted(), time.perf_counter()
                call()
                took = time.perf_counter() - start
                if preempted() == before:
                    c.kept.append(took)
                else:
                    c.thrown += 1
            turn += 1
        busy += time.perf_counter() - begun
        if raised:
            real_time(False)
        time.sleep(BURST)
    for c in contenders:
        if not c.kept:
            c.kept, c.thrown = [float("nan")], c.thrown


def copies(make: Callable[[], object], bytes: int) -> list:
    return [make() for _ in range(max(2, min(64, -(-COLD // max(bytes, 1)))))]


def sparse(n: int, k: int, sparsity: float, block: bool = False) -> torch.Tensor:
    """Random weights with this share of zeros, in 16 by 2 blocks where asked."""
    generator = torch.Generator().manual_seed(n + k)
    w = torch.randn(n, k, generator=generator)
    if block:
        keep = torch.rand(-(-n // 16), -(-k // 2), generator=generator) >= sparsity
        keep = keep.repeat_interleave(16, 0).repeat_interleave(2, 1)[:n, :k]
    else:
        keep = torch.rand(n, k, generator=generator) >= sparsity
    return (w * keep).bfloat16()


def ours(kernel: str, w: torch.Tensor, x: torch.Tensor, label: str = "") -> Contender:
    first = KERNELS[kernel].pack(w)

    def again() -> torch.Tensor:
        own = packed.room(first.numel())
        own.copy_(first)
        packed.check(kernel, own, len(w))
        return own

    held = copies(again, first.numel())
    op = getattr(torch.ops.effc, kernel).default
    calls = [lambda p=p: op(x, p, None, len(w)) for p in held]
    return Contender(label or kernel, calls, first.numel())


def eager(w: torch.Tensor, x: torch.Tensor) -> Contender:
    held = copies(w.clone, w.numel() * 2)
    return Contender("torch bf16", [lambda p=p: linear(x, p) for p in held], w.numel() * 2)


def prepacked(w: torch.Tensor, x: torch.Tensor) -> Contender:
    """What inductor's freezing gives: oneDNN's own layout, made once for these rows."""
    held = copies(lambda: torch.ops.mkldnn._reorder_linear_weight(w.clone(), len(x)), w.numel() * 2)
    op = torch.ops.mkldnn._linear_pointwise
    return Contender("torch pre-packed", [lambda p=p: op(x, p, None, "none", [], "") for p in held], w.numel() * 2)


def dynamic_int8(w: torch.Tensor, x: torch.Tensor) -> Contender:
    torch.backends.quantized.engine = "x86"
    scale = float(w.abs().max()) / 127
    quantised = torch.quantize_per_tensor(w.float(), scale, 0, torch.qint8)
    held = copies(lambda: torch.ops.quantized.linear_prepack(quantised, None), w.numel())
    wide = x.float()
    op = torch.ops.quantized.linear_dynamic
    return Contender("torch int8 dynamic", [lambda p=p: op(wide, p, reduce_range=False) for p in held], w.numel())


def roof(bytes: int, threads: int) -> Contender:
    """Reading as many bytes and doing nothing with them."""
    held = copies(lambda: packed.room(bytes).fill_(1), bytes)
    call, level = native.function("read"), levels.code()
    return Contender("read", [lambda p=p: call(level, p.data_ptr(), bytes, threads) for p in held], bytes)

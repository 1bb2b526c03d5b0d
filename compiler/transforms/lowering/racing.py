"""Timing functions against each other: in turn, over weights that no cache holds, on a machine that others use.

All are called one after the other, in alternating order, each over copies of its weights that together
exceed the last cache, so that every call reads memory. Each is called twice, and the second call is timed: the first
one brings code and page tables back that others displaced, which made it up to 1.8 times as slow. A sample counts if
no thread of this process was pre-empted in it (`ru_nivcsw`); the others are thrown away and counted. Bursts are short,
with real-time priority where the system allows, and other work gets as long in between. What comes out are ratios
within one race: seconds of two races can't be compared.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ...core.fingerprint import total_memory_bytes

COLD = 5  # how many times the last cache the copies of a weight exceed
BURST = 0.05  # seconds of one burst
_LARGE_CACHE, _LARGE_MEMORY = 32 << 20, 8 << 30  # bytes, where the system does not tell


@dataclass
class Contender:
    """Something timed: one callable per copy of its weights, and the bytes that one call must read."""

    name: str
    calls: list[Callable[[], object]]
    bytes: int = 0
    times: list[float] = field(default_factory=list)
    thrown: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median of the samples that count; of all, where the machine left none."""
        return statistics.median(self.times or self.thrown)


def race_and_record_times(contenders: Sequence[Contender], seconds_each: float, allow_real_time: bool = True) -> None:
    """Call all in turn until together they had `seconds_each`, or the machine gave them nothing for long."""
    for c in contenders:
        c.calls[0]()
    copy_index, until = 0, time.perf_counter() + seconds_each * len(contenders) * 8
    busy = 0.0
    while (busy < seconds_each * len(contenders) and time.perf_counter() < until) or copy_index < 6:
        raised = allow_real_time and try_set_real_time_priority(True)
        burst_start = time.perf_counter()
        try:
            while time.perf_counter() - burst_start < BURST:
                _time_one_call_each(contenders if copy_index % 2 else contenders[::-1], copy_index)
                copy_index += 1
        finally:
            if raised:
                try_set_real_time_priority(False)
        busy += time.perf_counter() - burst_start
        time.sleep(BURST)


def _time_one_call_each(contenders: Sequence[Contender], copy_index: int) -> None:
    for c in contenders:
        c.calls[2 * copy_index % len(c.calls)]()
        call = c.calls[(2 * copy_index + 1) % len(c.calls)]
        before, start = involuntary_switches(), time.perf_counter()
        call()
        elapsed = time.perf_counter() - start
        (c.times if involuntary_switches() == before else c.thrown).append(elapsed)


def involuntary_switches() -> int:
    """Number of involuntary context switches of this process; 0 where the system does not count them."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def try_set_real_time_priority(enabled: bool) -> bool:
    """Raise or lower all threads of this process; False where the system does not allow it."""
    try:
        policy, parameter = (os.SCHED_FIFO, os.sched_param(1)) if enabled else (os.SCHED_OTHER, os.sched_param(0))
        for thread in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):  # it ended meanwhile
                os.sched_setscheduler(int(thread), policy, parameter)
    except (OSError, AttributeError):
        return False
    return True


def cold_copies(make_copy: Callable[[], Any], copy_bytes: int) -> list[Any]:
    """Enough of what `make_copy` gives that calls which go round read none of it from a cache."""
    return [make_copy() for _ in range(_number_of_copies(copy_bytes))]


def bytes_of_cold_copies(copy_bytes: int) -> int:
    """Bytes of all copies of a contender whose weights take `copy_bytes`."""
    return copy_bytes * _number_of_copies(copy_bytes)


def _number_of_copies(copy_bytes: int) -> int:
    return max(1, min(256, -(-cold_working_set_bytes() // max(copy_bytes, 1))))


def cold_working_set_bytes() -> int:
    """Bytes of all copies of a contender.

    At most a 32nd of the memory, as up to eight race: a virtual machine sees the whole cache of its host, and where
    most of the memory is taken, large pages run out, without which every kernel reads at half the speed.
    """
    return min(COLD * last_level_cache_bytes(), (total_memory_bytes() or _LARGE_MEMORY) // 32)


@cache
def last_level_cache_bytes() -> int:
    """Bytes of the largest cache."""
    sizes = [_LARGE_CACHE]
    with suppress(OSError, ValueError):
        sizes = [
            int(f.read_text().strip().removesuffix("K")) << 10
            for f in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        ] or sizes
    return max(sizes)

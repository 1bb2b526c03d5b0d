"""Memory of this process, and a limit on it."""

import ctypes
import threading
from pathlib import Path

from ...dsl.syntax.diagnostics import Fault
from .fingerprint import total_memory_bytes
from .quantity import size_text

memory_bound = Fault(
    "memory-bound", "A compile would hold, or came to hold, more memory than it was allowed.", exit="resources"
)

SHARE = 0.75  # of the memory, for weights that are in use at once
LARGE = 0.25  # of the memory, for a copy of weights
_STATUS = Path("/proc/self/status")
_INTERVAL_S = 0.02


def anonymous_memory_bytes() -> int:
    """Bytes of anonymous memory: file-backed pages (mapped weights) can be dropped and don't count.

    0 where the system doesn't tell.
    """
    if not _STATUS.exists():
        return 0
    rows = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return sum(int(rows.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def trim_heap() -> None:
    """Have the allocator return what was freed to the system, where it can be told to (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if _STATUS.exists() else None
    if trim is not None:
        trim(0)


def trim_heap_and_get_memory_bytes() -> int:
    """Bytes in use after freed memory was returned, as before every stage."""
    trim_heap()
    return anonymous_memory_bytes()


class MemoryWatch:
    """Samples memory from a thread while a stage runs; `peak` is the most that it saw.

    `refuse_exceeded_limit` raises once the bound has been passed: passes call it through `ctx.each`.
    """

    def __init__(self, limit_bytes: int | None = None):
        self.limit, self.peak = limit_bytes, 0
        self._stop = threading.Event()

    def __enter__(self) -> "MemoryWatch":
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, anonymous_memory_bytes())
            self._stop.wait(_INTERVAL_S)

    def refuse_exceeded_limit(self) -> None:
        if self.limit is not None and self.peak > self.limit:
            raise memory_bound(
                f"{size_text(self.peak)} of memory are held, {size_text(self.limit)} are allowed",
                help="raise --max-memory, or score on fewer or shorter rows; finished work is kept in the cache",
            ).rejection()


def reuse_budget_bytes(limit_bytes: int | None) -> int:
    """Bytes that a stage may spend on keeping what it could compute again.

    Half of what the bound leaves above what is held now; without one, of what the system has to spare; 4 GiB at most.
    """
    spare = limit_bytes - anonymous_memory_bytes() if limit_bytes is not None else available_memory_bytes()
    return max(0, min(spare // 2, 4 << 30))


def fits_in_memory(weight_bytes: int) -> bool:
    """Whether the machine's memory holds so many bytes of weights at once, with room for what else there is."""
    total = total_memory_bytes()
    return total is None or weight_bytes < SHARE * total


def is_too_large_to_copy(file_bytes: int) -> bool:
    """Whether a file of weights is left where it lies, though a copy may be read faster: a copy takes seconds, and room
    that the system needs to hold the file."""
    total = total_memory_bytes()
    return total is not None and file_bytes > LARGE * total


def available_memory_bytes() -> int:
    """Bytes that could be allocated without swapping; 1 GiB where the system doesn't tell."""
    meminfo = Path("/proc/meminfo")
    rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines()) if meminfo.exists() else {}
    return int(rows["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in rows else 1 << 30

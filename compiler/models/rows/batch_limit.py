"""Number of rows per forward, and retries with fewer rows when a device is out of memory."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from ...core.device import empty_device_cache, out_of_device_memory_diagnostic
from ...core.events import Listener, Said

T = TypeVar("T")
MAX_ROWS = 16


class BatchLimit:
    """Rows of a forward. Fewer than `MOST` once a device had no room for them; it lasts as long as the process."""

    fewer: int | None = None


def max_rows_per_forward() -> int:
    return min(MAX_ROWS, BatchLimit.fewer or MAX_ROWS)


def micro_batches(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows that are learned from together, in as many parts as a device has room for: one, as long as it has."""
    return rows.split(BatchLimit.fewer or len(rows))


def retry_with_smaller_batches_on_oom(function: Callable[[], T], device: str, on_event: Listener) -> T:
    """Result of `function`, called again with half as many rows at once each time the device runs out of memory.

    Scores differ by rounding then, as they do between devices. Raises Reject (device-full) where one row is too much.
    """
    while True:
        try:
            return function()
        except torch.OutOfMemoryError:
            pass  # what the traceback holds is let go before it begins again
        gc.collect()  # models of earlier steps may be in reference cycles, which a full device does not collect
        empty_device_cache(device)
        current = max_rows_per_forward()
        if current == 1:
            raise out_of_device_memory_diagnostic(device, "running one row at a time").rejection()
        BatchLimit.fewer = current // 2
        on_event(Said(f"{device} has no room for {current} rows at once: begun again, {BatchLimit.fewer} at once"))

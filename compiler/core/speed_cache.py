"""The machine's speeds as they were measured, kept in the cache under all that they depend on."""

from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from .cache import Cache
from .fingerprint import machine_facts
from .speeds import Speeds, measure_machine_speeds


def speed_key_fields(threads: int) -> dict[str, Any]:
    """The machine, the versions, and threads."""
    return {"speeds of": {k: v for k, v in machine_facts().items() if k != "threads"}, "threads": threads, "format": 1}


@cache
def cached_or_measured_speeds(cache_dir: Path) -> Speeds:
    """Speeds that `effc doctor --measure` stored; else those of a quick measurement now."""
    import torch

    body = Cache(cache_dir).read_value(speed_key_fields(torch.get_num_threads()))
    has_all_fields = isinstance(body, dict) and body.keys() == Speeds.__dataclass_fields__.keys()
    if has_all_fields and all(type(v) in (int, float) and v > 0 for v in body.values() if v is not True):
        return Speeds(**body)
    return _probed_speeds(torch.get_num_threads())


@cache
def _probed_speeds(threads: int) -> Speeds:
    """Speeds of a quick measurement with this number of threads, which is torch's: half a second, once in a process."""
    return measure_machine_speeds()


def store_speeds(cache_dir: Path, measured: Speeds) -> None:
    """Keep what was measured, sealed, for plans of later runs."""
    import torch

    Cache(cache_dir).store_value(speed_key_fields(torch.get_num_threads()), asdict(measured))
    cached_or_measured_speeds.cache_clear()

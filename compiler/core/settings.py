"""Settings of a run, as the command line or the Python API grants them."""

from dataclasses import dataclass
from pathlib import Path

from .events import Listener, silent


@dataclass(frozen=True)
class Settings:
    """Settings of the command line; equal for every recipe of a run."""

    cache_dir: Path
    seed: int = 0
    device: str = "cpu"
    offline: bool = False
    trust_remote_code: bool = False
    max_memory: int | None = None  # bytes
    threads: int | None = None
    undecided: str = "fail"  # or "pass": what a timed bound that can't be decided comes to
    locked: bool = False  # refuse what is not as `effspec.lock` has it
    on_event: Listener = silent
    workers: str = ""  # how many processes score, "ray" or "ray:ADDRESS"; "" has none
    max_time: float | None = None  # seconds that searches may take

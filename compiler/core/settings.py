"""Settings of a run, as the command line or the Python API grants them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .events import Listener, silent

if TYPE_CHECKING:
    from .deadline import Deadline
    from .memory import MemoryWatch


@dataclass
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
    watch: "MemoryWatch | None" = None  # of the running stage; `each` asks it whether the bound is passed
    max_time: float | None = None  # seconds that searches may take
    deadline: "Deadline | None" = None  # of the running compile; `each` asks it whether searches have time

"""What targets reckon the size of their files with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Weights:
    """What a plan knows of a model's weights.

    bytes     as they are stored; `original` before any step
    numbers   of all weights, each once
    tables    of these, rows that are looked up; `heads` of those, what an output layer multiplies by, too
    alike     whether every layer lost alike, as far as steps say before they run
    lowered   of these, what a step packed for kernels already, into about `packed` bytes
    """

    bytes: int
    original: int
    numbers: int
    tables: int
    heads: int
    alike: bool = True
    lowered: int = 0
    packed: int = 0

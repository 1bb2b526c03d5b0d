"""Weight counts from which targets estimate the size of their files."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Weights:
    """Weight counts of a model in a plan.

    bytes     as they are stored; `original` before any step
    numbers   of all weights, each once
    tables    of these, rows that are looked up; `heads` of those, what an output layer multiplies by, too
    uniform   whether every layer lost alike, as far as steps say before they run
    lowered   of these, what a step packed for kernels already, into about `packed` bytes
    """

    bytes: int
    original: int
    numbers: int
    tables: int
    heads: int
    uniform: bool = True
    lowered: int = 0
    packed: int = 0

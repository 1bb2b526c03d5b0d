"""Weights of a planned model, from which targets estimate the size of their files."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Weight:
    """A tensor of a planned model; tensors that are one storage are one weight.

    table    its rows are looked up; `matrix`: inputs are multiplied with it. A tied embedding is both
    head     it makes the logits
    packed   bytes into which a step packed it for a kernel; of a table beside its rows
    grid     (bits, group, whether 0 is the middle code) on which a step put it; `group` 0: a row
    """

    shape: tuple[int, ...]
    table: bool = False
    matrix: bool = False
    head: bool = False
    packed: int = 0
    grid: tuple[int, int, bool] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def stored(self, size: Callable[["Weight"], float]) -> float:
        """Bytes where a step's packed weights stay as they are, and `size` gives those of others."""
        return self.packed + (size(self) if self.table or not self.packed else 0)


@dataclass(frozen=True)
class Weights:
    """Weights of a planned model.

    bytes      as the model stores them, `original` before any step
    itemsize   bytes of a number
    tensors    each once
    uniform    whether every layer lost alike, as far as steps say before they run
    n_layers   number of repeated layers
    sidecars   bytes of the tokenizer's files and others that go beside weights
    """

    bytes: int
    original: int
    itemsize: int
    tensors: tuple[Weight, ...]
    uniform: bool = True
    n_layers: int = 0
    sidecars: int = 0

    def stored(self, size: Callable[[Weight], float]) -> int:
        """Bytes of all weights; see `Weight.stored`."""
        return round(sum(weight.stored(size) for weight in self.tensors))

    @property
    def numbers_to_pack(self) -> float:
        """Number of weights that no step packed."""
        return float(sum(weight.numel for weight in self.tensors if not weight.packed))

"""What a step gives: a model, adapters that belong to one, or a front of models with their measures.

Everything after the passes (snapshots, emission, judging, `effc pick`) goes by `members`, so that a result of several
models needs no path of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from .program import Program


class Outcome(ABC):
    """A step's result. `kind` is what headers call it."""

    kind: ClassVar[str]

    @abstractmethod
    def members(self) -> Iterator[tuple[str, Program]]:
        """Its programs by name, one at a time and each made when it is its turn; the name of a lone one is ""."""


@dataclass
class Model(Outcome):
    """One program, which passes change in place."""

    kind: ClassVar[str] = "model"
    program: Program

    def members(self) -> Iterator[tuple[str, Program]]:
        yield "", self.program


@dataclass
class Adapters(Outcome):
    """Low-rank adapters and the program that they were trained on, which is as it was.

    base      key of the program's own result
    rank, alpha   `alpha / rank` scales the product B A
    tensors   "PATH.lora_A" [rank, in] and "PATH.lora_B" [out, rank] for the path of each adapted module
    """

    kind: ClassVar[str] = "adapters"
    program: Program
    base: str
    rank: int
    alpha: float
    dropout: float
    tensors: Mapping[str, Tensor]
    notes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def paths(self) -> tuple[str, ...]:
        """Modules that have an adapter, in the order of their names."""
        return tuple(sorted({name.rpartition(".")[0] for name in self.tensors}))

    def members(self) -> Iterator[tuple[str, Program]]:
        yield "", self.program


@dataclass(frozen=True)
class Point:
    """One model of a front.

    name       of the step that gave it
    key        of that step's result
    measures   metric as a recipe writes it -> (value, unit, "lower" or "higher")
    """

    name: str
    key: str
    measures: Mapping[str, tuple[float, str, str]]


@dataclass
class Front(Outcome):
    """Models that are each the best at something; `load` makes the program of a point."""

    kind: ClassVar[str] = "front"
    points: tuple[Point, ...]
    load: Callable[[str], Program]

    def members(self) -> Iterator[tuple[str, Program]]:
        for point in self.points:
            yield point.name, self.load(point.key)

"""Results of a step: a model, a front of models with their measures, or (transforms/training/unmerged.py) adapters.

Everything after the passes (snapshots, emission, judging, `effc pick`) goes by `members`, so that a result of several
models needs no path of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..core.quantity import count_text
from .program import Program

Members = Generator[tuple[str, Program], None, None]


class Outcome(ABC):
    """A step's result. `kind` is what headers call it."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def summary(self) -> str:
        """Summary for a progress line."""

    @abstractmethod
    def members(self) -> Members:
        """Its programs by name, one at a time and each made when it is its turn; the name of a lone one is ""."""


@dataclass
class Model(Outcome):
    """One program, which passes change in place."""

    kind: ClassVar[str] = "model"
    program: Program

    @property
    def summary(self) -> str:
        return ""

    def members(self) -> Members:
        yield "", self.program


@dataclass(frozen=True)
class Point:
    """One model of a front.

    name       of the step that gave it, or its own
    key        of that step's result, or of the family that it is a choice of
    measures   metric as a recipe writes it -> (value, unit, "lower" or "higher")
    """

    name: str
    key: str
    measures: Mapping[str, tuple[float, str, str]]
    choice: Mapping[str, int] | None = None  # of a family


@dataclass
class Front(Outcome):
    """Models that are each the best at something.

    load    makes the program of a point
    load_point  gives the family that a point is a choice of, where that can be had
    """

    kind: ClassVar[str] = "front"
    points: tuple[Point, ...]
    load: Callable[[Point], Program]
    load_point: "Callable[[Point], Outcome] | None" = None

    @property
    def summary(self) -> str:
        return count_text(len(self.points), "point")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(point.name for point in self.points)

    def members(self) -> Members:
        for point in self.points:
            yield point.name, self.load(point)

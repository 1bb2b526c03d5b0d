"""Results of a step: a model, a front of models with their measures, adapters apart from their model, a family.

Everything after the passes (the cache, emission, judging, `effc pick`) goes by the methods of `Outcome`, so that a new
kind of result is one class.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.cache import Cache
from ..core.quantity import count_text
from ..models.checkpoints.origin import Origin
from .program import Program
from .stored_program import restore_program, store_and_map_parameters

if TYPE_CHECKING:
    from .step_results import StepResults

Members = Generator[tuple[str, Program], None, None]
Measures = Mapping[str, tuple[float, str, str]]


class Outcome(ABC):
    """A step's result.

    kind       its name in the headers of passes and targets
    entry_key  key in the body of a cache entry that results of this kind alone have; "" of a model, which has none
    in_place   passes change its program in place, and it is compared before and after
    several    its members are models of their own: each is measured, and bounds are asked of each
    program    the one beneath all members; None where they have none in common
    """

    kind: ClassVar[str]
    entry_key: ClassVar[str]
    in_place: ClassVar[bool] = False
    several: ClassVar[bool] = False
    program: Program | None

    @property
    @abstractmethod
    def summary(self) -> str:
        """Summary for a progress line."""

    @abstractmethod
    def members(self) -> Members:
        """Its programs by name, one at a time and each made when it is its turn; the name of a lone one is ""."""

    @abstractmethod
    def store(self, cache: Cache, origin: Origin) -> dict[str, Any]:
        """Body of its cache entry, all tensors stored; `needs` in it are keys of other results."""

    @classmethod
    @abstractmethod
    def restore(cls, body: Mapping[str, Any], results: "StepResults") -> "Outcome":
        """Result that `store` gave a body of. Bodies may come from anybody: raises AssertionError, or what comes of
        reading another form, where one does not fit the model."""

    def with_base(self, key: str) -> "Outcome":
        """The result, where it refers to the step that it was made from: `key` of that one, "" of the recipe's
        model."""
        return self

    def program_at(self, point: "Point") -> Program:
        """Program of a front's point that refers to this result, which is used up."""
        raise AssertionError(f"{self.kind} has no points")

    @property
    def measures(self) -> Mapping[str, Measures]:
        """Measures by the names of members, where those are several: one or more of each."""
        return {}

    @property
    def notes(self) -> list[dict[str, Any]]:
        """Decisions of passes so far."""
        return self.program.notes if self.program else []


@dataclass
class Model(Outcome):
    """One program, which passes change in place."""

    kind: ClassVar[str] = "model"
    entry_key: ClassVar[str] = ""
    in_place: ClassVar[bool] = True
    program: Program

    @property
    def summary(self) -> str:
        return ""

    def members(self) -> Members:
        yield "", self.program

    def store(self, cache: Cache, origin: Origin) -> dict[str, Any]:
        return store_and_map_parameters(self.program, cache, origin)

    @classmethod
    def restore(cls, body: Mapping[str, Any], results: "StepResults") -> "Model":
        return cls(restore_program(body, results.cache, results.origin))

    def program_at(self, point: "Point") -> Program:
        return self.program


@dataclass(frozen=True)
class Point:
    """One model of a front.

    name       of the step that gave it, or its own
    key        of that step's result, or of the family that it is a choice of; "" until that one is known
    measures   metric as a recipe writes it -> (value, unit, "lower" or "higher")
    """

    name: str
    key: str
    measures: Measures
    choice: Mapping[str, int] | None = None  # of a family

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "key": self.key,
            "measures": [[name, *m] for name, m in self.measures.items()],
            "choice": self.choice and dict(self.choice),
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Point":
        return cls(body["name"], body["key"], {n: tuple(m) for n, *m in body["measures"]}, body.get("choice"))


@dataclass
class Front(Outcome):
    """Models that are each the best at something.

    results    of the steps that its points refer to; None where nobody asks for their programs
    """

    kind: ClassVar[str] = "front"
    entry_key: ClassVar[str] = "points"
    several: ClassVar[bool] = True
    points: tuple[Point, ...]
    results: "StepResults | None" = None
    program: None = field(default=None, init=False, repr=False)

    @property
    def summary(self) -> str:
        return count_text(len(self.points), "point")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(point.name for point in self.points)

    @property
    def measures(self) -> Mapping[str, Measures]:
        return {point.name: point.measures for point in self.points}

    def members(self) -> Members:
        for point in self.points:
            assert self.results is not None, "no pipeline runs that could have the points"
            yield point.name, self.results.program_at(point)

    def store(self, cache: Cache, origin: Origin) -> dict[str, Any]:
        return {
            "points": [point.to_json() for point in self.points],
            "needs": sorted({point.key for point in self.points}),
        }

    @classmethod
    def restore(cls, body: Mapping[str, Any], results: "StepResults") -> "Front":
        return cls(tuple(map(Point.from_json, body["points"])), results)

    def with_base(self, key: str) -> "Front":
        return replace(self, points=tuple(replace(point, key=point.key or key) for point in self.points))


_ENTRY = {"key", "parts", "needs", "tensors", "borrowed", "edits", "notes", "seal"}  # keys of all entries


def outcome_class_of_entry(body: Mapping[str, Any]) -> type[Outcome]:
    """Class of the result that a cache entry holds, among those that were imported, as passes import what they give.

    Raises AssertionError where there is none.
    """
    keys = body.keys() - _ENTRY
    if not keys:
        return Model
    kinds = [kind for kind in Outcome.__subclasses__() if kind.entry_key in keys]
    assert len(kinds) == 1, f"no kind of result is stored as {', '.join(sorted(keys))}"
    return kinds[0]

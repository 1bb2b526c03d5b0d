"""Candidates of a search."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from ...ir.program import Program


class Candidate(ABC):
    """Something that may be cut from a program.

    name    tells the candidates of a round apart, in journals and notes: "model.layers.3.mlp"
    location  what it takes from, the same from round to round: what its last score is remembered under
    unit    path of the layer whose forward it changes; those before it run as if it were there
    joins   whether it may be tried and cut together with others of other layers
    """

    joins: ClassVar[bool] = False
    if TYPE_CHECKING:  # fields of some, properties of others: a field can't stand over a real property

        @property
        def name(self) -> str: ...

        @property
        def location(self) -> str: ...

        @property
        def unit(self) -> str: ...

    @abstractmethod
    def applied(self) -> AbstractContextManager[None]:
        """The program without it, for as long as the context lasts."""

    @abstractmethod
    def cut(self) -> None:
        """Take it out for good."""

    @abstractmethod
    def saves(self, quantity: str) -> float:
        """Amount of "params", "flops", "blocks", "channels", ... the program loses with it."""


@dataclass(frozen=True)
class JointCandidate:
    """Several candidates of different layers, tried at once; `units` are all layers in order."""

    members: tuple[Candidate, ...]
    units: Sequence[str]

    @property
    def name(self) -> str:
        return " + ".join(c.name for c in self.members)

    @property
    def unit(self) -> str:
        """The first that changes."""
        return min((c.unit for c in self.members), key=self.units.index)

    @contextmanager
    def applied(self) -> Iterator[None]:
        with ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member.applied())
            yield


class Pool(ABC):
    """The candidates of one kind, as far as a search has come.

    kind   "blocks", "channels", "heads"
    """

    kind: str
    program: "Program"

    @abstractmethod
    def candidates(self) -> Sequence[Candidate]:
        """Current candidates, in the order that settles ties."""

    @abstractmethod
    def reachable(self, quantity: str) -> float:
        """The most that can be saved when everything that may go is cut."""

    def finish(self) -> None:  # noqa: B027 (pools whose cuts are real at once have nothing to do)
        """Make cuts that were only masked real, when the search is over."""


@dataclass(frozen=True)
class Cut:
    """One decision: what was cut, the model's score without it, what else was in question, and what it saved."""

    name: str
    kind: str
    score: float
    runner_up: float | None  # the best score that lost
    scores: dict[str, float]  # of every candidate that was scored in this round
    saved: float  # so far, of what the budget counts
    total: float  # of what the budget counts, in the whole model

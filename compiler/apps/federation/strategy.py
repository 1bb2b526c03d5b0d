"""Strategy of a method: server state, payload for each client, and aggregation."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .grid import Plain
from .state import Shapes, State


@dataclass(frozen=True)
class Payload:
    """For one client in one round: states by their use, and settings."""

    arrays: Mapping[str, State] = field(default_factory=dict)
    config: Plain = field(default_factory=dict)


@dataclass(frozen=True)
class TrainedState:
    """Result of a client in a round: the state that it trained and how many examples it has."""

    state: State
    examples: float


def states_of(client_states: Mapping[int, TrainedState]) -> dict[int, State]:
    return {client: one.state for client, one in client_states.items()}


def examples_of(client_states: Mapping[int, TrainedState]) -> dict[int, float]:
    return {client: one.examples for client, one in client_states.items()}


class Strategy(ABC):
    """Clients are named by the number of their partition, which outlives a node.

    full      shapes of a whole state, that of the largest client
    personal  every client ends with a state of its own
    starts    all begin from one state, which the server asks a client for; else clients draw their own
    secure   the server is given sums of masked states, and never a state (secure.py)
    """

    personal: bool = False
    starts: bool = True
    secure: bool = False

    def __init__(self, full_shapes: Shapes):
        self.full = dict(full_shapes)
        self.initial: State = {}

    def begin(self, initial: State) -> None:
        """Take the state that every client starts from."""
        self.initial = dict(initial)

    def prepare(self, round_number: int, clients: Sequence[int]) -> None:  # noqa: B027 (most do the same every round)
        """A round with these clients begins."""

    @abstractmethod
    def payload(self, client: int, round_number: int, last_round: int | None) -> Payload:
        """Payload for a client in a round. `last_round` is the last round whose state it has in memory, None for
        none."""

    def can_provide_initial_state(self, client: int) -> bool:
        """Whether a client can tell the state that all start from."""
        return True

    def required_shapes(self, client: int) -> Shapes:
        """The arrays that a client has to send."""
        return self.full

    @abstractmethod
    def aggregate(self, round_number: int, client_states: Mapping[int, TrainedState]) -> None:
        """Put a round together."""

    def aggregate_from_sum(self, total: State, clients: Sequence[int]) -> None:
        """Put a round together of which only the sum is told."""
        raise AssertionError(f"{type(self).__name__} is secure, and takes no sums")

    @abstractmethod
    def results(self) -> dict[str, State]:
        """The states that a user gets: "global", or "client-3" of each."""

    @abstractmethod
    def saved(self) -> dict[str, State]:
        """All that it keeps, by name; `restore` takes it back."""

    @abstractmethod
    def restore(self, arrays: Mapping[str, State]) -> None: ...

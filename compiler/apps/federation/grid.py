"""Messages between the server and its clients, and a grid that has all clients in this process.

The grid has the methods of Flower's: `get_node_ids`, `push_messages`, `pull_messages`. The round loop knows these three
and nothing else, so that it runs unchanged here, in Flower's simulation and in its deployment (flower.py).
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .state import State, n_bytes_of_state

LONGEST_POLL = 3.0  # seconds between two looks for replies, as Flower's own grid waits
SENTENCE = 500  # characters of what a client says went wrong
Plain = Mapping[str, str | int | float | bool]
Config = Mapping[str, str | int | float | bool | list[float]]  # what a client says, who may say anything


@dataclass(frozen=True)
class Message:
    """From the server to one node. `kind` is "join", "initial" or "train"; `arrays` are states by their use."""

    node: int
    kind: str
    number: int  # of the round
    arrays: Mapping[str, State] = field(default_factory=dict)
    config: Plain = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(n_bytes_of_state(state) for state in self.arrays.values())


@dataclass(frozen=True)
class Reply:
    """From a node. `to` is the id of the message; `error` a sentence where the node could not do it."""

    to: str
    node: int
    arrays: Mapping[str, State] = field(default_factory=dict)
    config: Config = field(default_factory=dict)
    error: str = ""

    @property
    def bytes(self) -> int:
        return sum(n_bytes_of_state(state) for state in self.arrays.values())


class Grid(Protocol):
    def get_node_ids(self) -> Iterable[int]: ...

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]: ...

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Reply]: ...


@dataclass(frozen=True)
class Answer:
    """Reply of a client to a message."""

    arrays: Mapping[str, State] = field(default_factory=dict)
    config: Config = field(default_factory=dict)


# A client: what came, and a dict of its own that lasts as long as its node does.
Client = Callable[[Message, dict[str, Any]], Answer]


class LocalGrid:
    """Clients in this process; `workers` of them answer at a time.

    A client that raises has answered with an error. One that never returns keeps its worker, which is a daemon: it
    ends with the process. What waited for a worker past its round's deadline is not begun any more.
    """

    def __init__(self, clients: Sequence[Client], workers: int = 1):
        self.clients = dict(enumerate(clients, start=1))
        self.memories: dict[int, dict[str, Any]] = {node: {} for node in self.clients}
        self._free = threading.Semaphore(workers)
        self._locks = {node: threading.Lock() for node in self.clients}  # a node does one thing at a time
        self._replies: dict[str, Reply] = {}
        self._count = 0

    def get_node_ids(self) -> list[int]:
        return list(self.clients)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = []
        for message in messages:
            self._count += 1
            names.append(str(self._count))
            threading.Thread(target=self._answer_message, args=(names[-1], message), daemon=True).start()
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Reply]:
        return [self._replies.pop(name) for name in list(message_ids) if name in self._replies]

    def _answer_message(self, message_id: str, message: Message) -> None:
        pushed = time.monotonic()
        with self._locks[message.node], self._free:
            if time.monotonic() - pushed > float(message.config.get("deadline", float("inf"))):
                return
            try:
                answer = self.clients[message.node](message, self.memories[message.node])
                self._replies[message_id] = Reply(message_id, message.node, answer.arrays, answer.config)
            except Exception as error:  # whatever it is: the engine of a deployment tells no more either
                self._replies[message_id] = Reply(
                    message_id, message.node, error=(str(error) or type(error).__name__)[:SENTENCE]
                )


def poll_interval_s(waited_s: float, first_interval_s: float) -> float:
    """Seconds until the next look: a fiftieth of those waited so far, within `first_interval_s` and LONGEST_POLL."""
    return max(first_interval_s, min(waited_s / 50, LONGEST_POLL))


def send_and_receive(
    grid: Grid, messages: Sequence[Message], timeout_s: float, first_poll_interval_s: float
) -> list[Reply]:
    """The replies that came within `timeout_s` seconds.

    It looks every `first_poll_interval_s` seconds at first, then more rarely: each look costs a deployment bytes and
    processor time, and a reply that took a minute may lie there for a second.
    """
    started, ids = time.monotonic(), list(grid.push_messages(messages))
    waiting, replies, end = {name for name in ids if name}, [], started + timeout_s
    while waiting:
        for reply in grid.pull_messages(sorted(waiting)):
            waiting.discard(reply.to)
            replies.append(reply)
        time_s = time.monotonic()
        if not waiting or time_s >= end:
            break
        time.sleep(min(poll_interval_s(time_s - started, first_poll_interval_s), end - time_s))
    return replies

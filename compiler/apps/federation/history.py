"""History of a federation, round by round: plain data."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ClientUpdate:
    """Update of a client in a round; `faults` of the round say why one is missing here.

    loss        after training, on its own held-out rows, nats per token; NaN where it has none
    before      the same before training, after it took in what was sent
    examples    rows that it learns from
    mix         share of the others that it took in
    accuracy    share of its held-out rows whose class it tells; NaN where rows have none
    by_task     of a stream: the loss on each task that it has met
    """

    loss: float
    before: float
    examples: float
    seconds: float
    bytes_up: int
    bytes_down: int
    mix: float = math.nan
    accuracy: float = math.nan
    by_task: tuple[float, ...] = ()


@dataclass(frozen=True)
class Round:
    """A round: turns of clients whose state was used, and a sentence for each that was not."""

    number: int
    updates: Mapping[int, ClientUpdate]
    faults: Mapping[int, str]
    seconds: float

    @property
    def bytes_up(self) -> int:
        return sum(result.bytes_up for result in self.updates.values())

    @property
    def bytes_down(self) -> int:
        return sum(result.bytes_down for result in self.updates.values())

    @property
    def loss(self) -> float:
        """Mean over the clients that have held-out rows."""
        known = [t.loss for t in self.updates.values() if not math.isnan(t.loss)]
        return math.fsum(known) / len(known) if known else math.nan

    @property
    def accuracy(self) -> float:
        """Mean over the clients that tell classes; NaN where none does."""
        known = [t.accuracy for t in self.updates.values() if not math.isnan(t.accuracy)]
        return math.fsum(known) / len(known) if known else math.nan

    @property
    def worst(self) -> float:
        """The loss of the client that is worst off."""
        return max((t.loss for t in self.updates.values() if not math.isnan(t.loss)), default=math.nan)

    def to_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "seconds": self.seconds,
            "turns": {str(k): _nan_to_null(asdict(t)) for k, t in sorted(self.updates.items())},
            "faults": {str(k): text for k, text in sorted(self.faults.items())},
        }

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> "Round":
        results = {int(k): ClientUpdate(**{n: _null_to_nan(v) for n, v in t.items()}) for k, t in body["turns"].items()}
        return Round(body["number"], results, {int(k): text for k, text in body["faults"].items()}, body["seconds"])


def _nan_to_null(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(one) for one in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    return {n: plain(v) for n, v in values.items()}


def _null_to_nan(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_null_to_nan(one) for one in value)
    return math.nan if value is None else value


@dataclass
class History:
    rounds: list[Round] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Of all rounds, both ways."""
        return sum(r.bytes_up + r.bytes_down for r in self.rounds)

"""Strategies in which the server learns a sum of states and no state: what masks.py makes possible, and no more.

A round has two halves. Clients train and keep what they learned; those that did are then asked for it under masks that
cancel in the sum. Where one is lost between the two, the others are asked again without its masks.
"""

import json
from collections.abc import Mapping, Sequence

import numpy as np

from .grid import Message
from .masks import from_fixed_point
from .rotations import with_orthonormal_rotations
from .state import Shapes, State
from .strategy import Payload, Strategy, TrainedState

LEAST = 3  # clients of a sum: with two, each learns the other's state


class SecureSum(Strategy):
    """The plain mean of all, or All-But-Me with the mean, which a client works out from the sum by itself.

    mix    share of the others that a client takes in; None: what its validation likes best; for the plain mean 1
    personal clients keep a state of their own (All-But-Me)
    """

    secure = True

    def __init__(self, full_shapes: Shapes, all_but_me: bool, mix: float | None):
        super().__init__(full_shapes)
        self.personal, self.mix = all_but_me, mix
        self.mean: State = {}
        self.summed: tuple[int, ...] = ()  # clients of the last sum

    def begin(self, initial: State) -> None:
        super().begin(initial)
        self.mean = dict(initial)

    def payload(self, client: int, round_number: int, last_round: int | None) -> Payload:
        if not self.personal or not self.summed or (last_round is None and client not in self.summed):
            return Payload({"global": self.mean}, {"secure": True})
        share = "adaptive" if self.mix is None else self.mix
        return Payload(
            {"mean": self.mean},
            {"secure": True, "mix": share, "way": "project", "among": len(self.summed) * (client in self.summed)},
        )

    def aggregate(self, round_number: int, client_states: Mapping[int, TrainedState]) -> None:
        raise AssertionError("a secure strategy is given sums")

    def aggregate_from_sum(self, total: State, clients: Sequence[int]) -> None:
        """The sum of the states of these clients."""
        self.mean = {name: (array / len(clients)).astype(np.float32) for name, array in total.items()}
        self.summed = tuple(clients)

    def results(self) -> dict[str, State]:
        """The mean alone: with `own`, what a client made of it stays with the client."""
        return {"global": with_orthonormal_rotations(self.mean)}

    def saved(self) -> dict[str, State]:
        return {"mean": self.mean, "summed": {"clients": np.array(self.summed, np.float64)}}

    def restore(self, arrays: Mapping[str, State]) -> None:
        self.mean = dict(arrays["mean"])
        self.initial = dict(self.mean)
        self.summed = tuple(int(k) for k in arrays.get("summed", {}).get("clients", ()))


def make_masked_update_request(node: int, client: int, round_number: int, public_keys: Mapping[int, str]) -> Message:
    """Ask a client for its state of this round under masks against these clients, by their public keys."""
    publics_json = json.dumps({str(k): key for k, key in sorted(public_keys.items())})
    return Message(node, "masked", round_number, {}, {"client": client, "publics": publics_json})


def sum_of_masked_states(masked_states: Sequence[np.ndarray], shapes: Shapes) -> State:
    """The sum of masked states, in which the masks have cancelled."""
    total = np.zeros_like(masked_states[0])
    for vector in masked_states:
        total = total + vector  # uint32: modulo 2^32
    return from_fixed_point(total, shapes)

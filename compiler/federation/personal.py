"""Strategies in which every client has a state of its own: FedReFT's All-But-Me, and training alone."""

from collections.abc import Mapping

import numpy as np

from .all_but_me import Center, shares_of_others
from .median import gram
from .rotations import Way, combined, function_gram, paths, projected
from .state import Shapes, State, normal
from .strategy import Payload, Sent, Strategy


class AllButMe(Strategy):
    """Every client gets what the others sent, put together, and takes a share of it into its own state.

    "The others" are all whose state is known, those of earlier rounds too. A client's own state travels down where
    its node doesn't have it: at its first round, and after it failed or was away.

    center    the mean of the others, or their geometric median
    way       how interventions are put together (rotations.py)
    share     how much of the others a client takes in; None: what its validation likes best
    Source: FedReFT, Siddika et al. 2025 (arXiv 2508.20295).
    """

    personal = True

    def __init__(self, full: Shapes, center: Center, way: Way, share: float | None):
        super().__init__(full)
        self.center, self.way, self.share = center, way, share
        self.states: dict[int, State] = {}
        self.examples: dict[int, float] = {}
        self._shares: dict[int, dict[int, float]] = {}  # of medians
        self._sums: dict[str, np.ndarray] = {}  # of all states, weighted

    def payload(self, client: int, number: int, holds: int | None) -> Payload:
        arrays: dict[str, State] = {}
        if holds is None:
            arrays["own"] = self.states.get(client, self.initial)
        if others := self._mean_of_others(client):
            arrays["others"] = others
        share = "adaptive" if self.share is None else self.share
        return Payload(arrays, {"mix": share, "way": self.way})

    def _mean_of_others(self, client: int) -> State:
        """What the others sent, put together; nothing where there are none."""
        if self.share == 0:
            return {}
        rest = {k: w for k, w in self.examples.items() if k != client and w > 0}
        shares = self._shares.get(client) or (normal(rest) if rest else {})
        if shares and self.center == "mean" and self.way == "project":
            return self._without(client)
        return combined(self.states, shares, self.states.get(client, self.initial), self.way) if shares else {}

    def _without(self, client: int) -> State:
        """The mean of the others from the sum of all: a round of many clients costs as many sums, not their square."""
        if not self._sums:
            some = next(iter(self.states.values()))
            self._sums = {
                name: sum(self.examples[k] * self.states[k][name].astype(np.float64) for k in sorted(self.states))
                for name in some
            }
        mine = self.examples.get(client, 0.0)
        mass = sum(self.examples.values()) - mine
        own = self.states.get(client, self.initial)
        return projected(
            {n: ((s - mine * own[n].astype(np.float64)) / mass).astype(own[n].dtype) for n, s in self._sums.items()}
        )

    def take(self, number: int, sent: Mapping[int, Sent]) -> None:
        for client, one in sent.items():
            self.states[client], self.examples[client] = one.state, one.examples
        self._weigh()

    def _weigh(self) -> None:
        self._shares, self._sums = {}, {}
        if self.center == "median" and self.states:
            some = next(iter(self.states.values()))
            products = function_gram(self.states) if self.way == "function" and paths(some) else gram(self.states)
            self._shares = shares_of_others(self.examples, products)

    def results(self) -> dict[str, State]:
        return {f"client-{client}": state for client, state in sorted(self.states.items())}

    def saved(self) -> dict[str, State]:
        clients = sorted(self.states)
        return {f"client-{k}": self.states[k] for k in clients} | {
            "initial": self.initial,
            "examples": {str(k): np.array([self.examples[k]]) for k in clients},
        }

    def restore(self, saved: Mapping[str, State]) -> None:
        self.initial = dict(saved["initial"])
        self.examples = {int(k): float(v[0]) for k, v in saved.get("examples", {}).items()}
        self.states = {k: saved[f"client-{k}"] for k in sorted(self.examples)}
        self._weigh()

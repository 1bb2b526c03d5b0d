"""Strategies in which every client has a state of its own: FedReFT's All-But-Me, and training alone."""

from collections.abc import Mapping

import numpy as np

from .all_but_me import Center, leave_one_out_shares
from .leave_one_out import LeaveOneOut
from .median import centered_gram, geometric_median_weights
from .rotations import Way, function_gram, intervention_paths, weighted_intervention_mean
from .state import Shapes, State, normalized_weights
from .strategy import Payload, Strategy, TrainedState

MANY = 64  # clients: of more, medians one by one and means of functions cost their square


class AllButMe(Strategy):
    """Every client gets what the others sent, put together, and takes a share of it into its own state.

    "The others" are all whose state is known, those of earlier rounds too. A client's own state travels down where
    its node doesn't have it: at its first round, and after it failed or was away.

    A mean costs as much for each client however many there are (rest.py). A median is found for each of up to MANY
    clients; of more, one is found of all, and everybody gets the mean of the others with the weights that it gave them.

    center    the mean of the others by their examples, or their geometric median, in which all count alike: what a
              client says of itself gives it no weight
    way       how interventions are put together (rotations.py)
    share     how much of the others a client takes in; None: what its validation likes best
    Source: FedReFT, Siddika et al. 2025 (arXiv 2508.20295).
    """

    personal = True

    def __init__(self, full_shapes: Shapes, center: Center, personalisation: Way, server_share: float | None):
        super().__init__(full_shapes)
        self.center, self.way, self.share = center, personalisation, server_share
        self.states: dict[int, State] = {}
        self.examples: dict[int, float] = {}
        self._shares: dict[int, dict[int, float]] = {}  # of a median for each
        self._leave_one_out: LeaveOneOut | None = None

    def payload(self, client: int, round_number: int, last_round: int | None) -> Payload:
        arrays: dict[str, State] = {}
        if last_round is None:
            arrays["own"] = self.states.get(client, self.initial)
        if mean_without := self._leave_one_out_mean(client):
            arrays["others"] = mean_without
        share = "adaptive" if self.share is None else self.share
        return Payload(arrays, {"mix": share, "way": self.way})

    def _leave_one_out_mean(self, client: int) -> State:
        """Aggregate of the other clients; nothing where there are none."""
        if self.share == 0:
            return {}
        state = self.states.get(client, self.initial)
        if self._leave_one_out is not None:
            return self._leave_one_out.mean_for(client, state)
        other_weights = {k: w for k, w in self.examples.items() if k != client and w > 0}
        shares = self._shares.get(client) or (normalized_weights(other_weights) if other_weights else {})
        return weighted_intervention_mean(self.states, shares, state, self.way) if shares else {}

    def aggregate(self, round_number: int, client_states: Mapping[int, TrainedState]) -> None:
        for client, one in client_states.items():
            self.states[client], self.examples[client] = one.state, one.examples
        self._prepare_leave_one_out()

    def _prepare_leave_one_out(self) -> None:
        self._shares, self._leave_one_out = {}, None
        if not self.states or self.share == 0:
            return
        some = next(iter(self.states.values()))
        if self.center == "median" and len(self.states) <= MANY:
            products = (
                function_gram(self.states)
                if self.way == "function" and intervention_paths(some)
                else centered_gram(self.states)
            )
            self._shares = leave_one_out_shares(dict.fromkeys(self.examples, 1.0), products)
        elif self.way != "function" or not intervention_paths(some):
            equal = dict.fromkeys(self.examples, 1.0)
            weights = geometric_median_weights(self.states, equal) if self.center == "median" else self.examples
            self._leave_one_out = LeaveOneOut(self.states, weights, "align" if self.way == "align" else "project")

    def results(self) -> dict[str, State]:
        return {f"client-{client}": state for client, state in sorted(self.states.items())}

    def saved(self) -> dict[str, State]:
        clients = sorted(self.states)
        return {f"client-{k}": self.states[k] for k in clients} | {
            "initial": self.initial,
            "examples": {str(k): np.array([self.examples[k]]) for k in clients},
        }

    def restore(self, arrays: Mapping[str, State]) -> None:
        self.initial = dict(arrays["initial"])
        self.examples = {int(k): float(v[0]) for k, v in arrays.get("examples", {}).items()}
        self.states = {k: arrays[f"client-{k}"] for k in sorted(self.examples)}
        self._prepare_leave_one_out()

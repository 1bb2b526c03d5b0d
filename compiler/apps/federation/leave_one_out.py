"""The weighted mean of all clients but one, for each of them: the sum of all, less its own part.

So a round of many clients costs as many sums as there are clients, not their square. Where interventions are aligned,
all are turned into one frame first (towards the mean of all as the client of the lowest number has it), and what a
client gets is turned towards its own rows.
"""

from collections.abc import Mapping

import numpy as np

from .rotations import Way, align_rotation, intervention_paths, with_orthonormal_rotations
from .state import State, weighted_sum

MAX_WEIGHT = 1e6  # times what is left that a client's own part may be: float64 then still has ten digits of the rest


class LeaveOneOut:
    """Of states with weights of at least 0; `way` is `project` or `align` (rotations.py)."""

    def __init__(self, states: Mapping[int, State], weights: Mapping[int, float], personalisation: Way):
        assert personalisation in ("project", "align"), personalisation
        self.states, self.way = states, personalisation
        self.weights = {k: w for k, w in sorted(weights.items()) if w > 0}
        self.frame: State = {}
        if self.weights and personalisation == "align" and intervention_paths(states[min(self.weights)]):
            self.frame = states[min(self.weights)]
            self.frame = self._aligned_mean(sorted(self.weights))
        self.mass = sum(self.weights.values())
        self.sums = self._weighted_sum(sorted(self.weights)) if self.weights else {}

    def mean_for(self, client: int, state: State) -> State:
        """The mean of the others with orthonormal rows R, near to those of `state`; {} where there are no others."""
        mine = self.weights.get(client, 0.0)
        n_rest = len(self.weights) - (client in self.weights)
        if not n_rest:
            return {}
        part = self._aligned_float64(self.states[client]) if mine else {}
        left = {name: array - mine * part[name] if mine else array for name, array in self.sums.items()}
        if mine and any(_max_abs(mine * part[name]) > MAX_WEIGHT * _max_abs(left[name]) for name in left):
            left = self._weighted_sum([k for k in self.weights if k != client])  # what is left would be rounding
        mass = self.mass - mine if mine <= MAX_WEIGHT * (self.mass - mine) else self._total_weight_without(client)
        mean = with_orthonormal_rotations(
            {name: (array / mass).astype(state[name].dtype) for name, array in left.items()}
        )
        return align_rotation(mean, state) if self.frame else mean

    def _total_weight_without(self, client: int) -> float:
        return sum(w for k, w in self.weights.items() if k != client)

    def _aligned_float64(self, client_state: State) -> dict[str, np.ndarray]:
        turned = align_rotation(client_state, self.frame) if self.frame else client_state
        return {name: array.astype(np.float64) for name, array in turned.items()}

    def _weighted_sum(self, clients: list[int]) -> dict[str, np.ndarray]:
        """Weighted sum of the clients' states in float64, in the order of clients."""
        totals = {name: np.zeros(array.shape) for name, array in self.states[clients[0]].items()}
        for k in clients:
            for name, array in self._aligned_float64(self.states[k]).items():
                totals[name] += self.weights[k] * array
        return totals

    def _aligned_mean(self, clients: list[int]) -> dict[str, np.ndarray]:
        aligned_states = {k: align_rotation(self.states[k], self.frame) for k in clients}
        mass = sum(self.weights[k] for k in clients)
        return weighted_sum(aligned_states, {k: self.weights[k] / mass for k in clients})


def _max_abs(array: np.ndarray) -> float:
    return float(np.abs(array).max()) if array.size else 0.0

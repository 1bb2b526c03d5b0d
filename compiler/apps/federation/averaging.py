"""Strategies with one state for all: FedAvg and FedIT, FFA-LoRA, and both with clipping and noise."""

from collections.abc import Mapping

from .low_rank import lora_module_paths
from .noise import noisy_mean
from .rotations import with_orthonormal_rotations
from .state import Shapes, State, mean
from .strategy import Payload, Strategy, TrainedState, examples_of, states_of


class FedAvg(Strategy):
    """Every client trains the mean of all; over the factors of adapters this is FedIT.

    clip, noise    bound of a client's change and noise over it (noise.py); 0 for none
    """

    def __init__(self, full_shapes: Shapes, clip: float = 0.0, noise: float = 0.0, seed: int | None = None):
        super().__init__(full_shapes)
        self.clip, self.noise, self.seed = clip, noise, seed
        self.state: State = {}

    def begin(self, initial: State) -> None:
        super().begin(initial)
        self.state = dict(initial)

    def payload(self, client: int, round_number: int, last_round: int | None) -> Payload:
        return Payload({"global": self.state})

    def aggregate(self, round_number: int, client_states: Mapping[int, TrainedState]) -> None:
        states = states_of(client_states)
        if self.clip:
            seed = None if self.seed is None else self.seed + round_number
            self.state = noisy_mean(states, self._global_state_before(states), self.clip, self.noise, seed)
        else:
            self.state = mean(states, examples_of(client_states))
        self.state = with_orthonormal_rotations(self.state)  # rows R of interventions stay orthonormal

    def _global_state_before(self, states: Mapping[int, State]) -> State:
        return {name: self.state[name] for name in next(iter(states.values()))}

    def results(self) -> dict[str, State]:
        return {"global": self.state}

    def saved(self) -> dict[str, State]:
        return {"state": self.state}

    def restore(self, arrays: Mapping[str, State]) -> None:
        self.state = arrays["state"]


class FrozenA(FedAvg):
    """FFA-LoRA: A stays as it was drawn, B alone is trained, sent and averaged, which is exact: B A is linear in B.

    A goes to a client once.
    Source: Sun et al. 2024 (arXiv 2403.12313).
    """

    def payload(self, client: int, round_number: int, last_round: int | None) -> Payload:
        arrays = {"global": {name: self.state[name] for name in self.required_shapes(client)}}
        if last_round is None:
            arrays["fixed"] = {f"{path}.A": self.initial[f"{path}.A"] for path in lora_module_paths(self.full)}
        return Payload(arrays)

    def required_shapes(self, client: int) -> Shapes:
        fixed = {f"{path}.A" for path in lora_module_paths(self.full)}
        return {name: shape for name, shape in self.full.items() if name not in fixed}

    def aggregate(self, round_number: int, client_states: Mapping[int, TrainedState]) -> None:
        super().aggregate(round_number, client_states)
        self.state = {**self.initial, **self.state}

    def restore(self, arrays: Mapping[str, State]) -> None:
        self.state = arrays["state"]
        self.initial = dict(arrays["state"])

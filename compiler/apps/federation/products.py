"""Strategies that put together the products of adapters, not their factors: stacking, FlexLoRA and HetLoRA."""

from abc import abstractmethod
from collections.abc import Mapping

from .low_rank import (
    lora_module_paths,
    padded_mean_weighted_by_update_norm,
    resize_lora_rank,
    stack_factors,
    truncate_to_rank,
)
from .state import Shapes, State, mean
from .strategy import Payload, Strategy, TrainedState, examples_of, states_of


def shapes_at_rank(full_shapes: Shapes, rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of adapters of another rank."""
    result: dict[str, tuple[int, ...]] = {}
    for path in lora_module_paths(full_shapes):
        result[f"{path}.A"] = (rank, full_shapes[f"{path}.A"][1])
        result[f"{path}.B"] = (full_shapes[f"{path}.B"][0], rank)
    return result


class RankedStrategy(Strategy):
    """Clients whose adapters may have ranks of their own. What they train beside adapters, a head over whole rows, is
    averaged by their examples, whatever becomes of the adapters.

    alpha   what an adapter's product is multiplied with, divided by its rank
    ranks   by client; one without a rank has that of `full_shapes`
    """

    def __init__(self, full_shapes: Shapes, alpha: float, ranks: Mapping[int, int]):
        super().__init__(full_shapes)
        self.alpha, self.ranks = alpha, ranks
        self.head: State = {}
        factors = {f"{path}.{side}" for path in lora_module_paths(full_shapes) for side in "AB"}
        self._head_shapes = {name: shape for name, shape in full_shapes.items() if name not in factors}

    def begin(self, initial: State) -> None:
        super().begin(initial)
        self.head = {name: initial[name] for name in self._head_shapes}

    def required_shapes(self, client: int) -> Shapes:
        return {**shapes_at_rank(self.full, self._rank(client)), **self._head_shapes}

    def aggregate(self, round_number: int, client_states: Mapping[int, TrainedState]) -> None:
        states, examples = states_of(client_states), examples_of(client_states)
        self._aggregate_adapters(round_number, states, examples)
        if self._head_shapes:
            heads = {client: {name: state[name] for name in self._head_shapes} for client, state in states.items()}
            self.head = mean(heads, examples)

    @abstractmethod
    def _aggregate_adapters(
        self, round_number: int, states: Mapping[int, State], examples: Mapping[int, float]
    ) -> None: ...

    def _rank(self, client: int) -> int:
        return self.ranks.get(client) or rank_of_shapes(self.full)

    def _saved_head(self) -> dict[str, State]:
        return {"head": self.head} if self.head else {}

    def restore(self, arrays: Mapping[str, State]) -> None:
        self.head = arrays.get("head", {})


class StackedAverage(RankedStrategy):
    """FLoRA: the exact mean. What a round learned is merged into every client's weights, and new adapters begin.

    The server keeps the stacks of all rounds: a client that has been away gets those that it missed, in their order.
    Source: Wang et al. 2024 (arXiv 2409.05976).
    """

    starts = False

    def __init__(self, full_shapes: Shapes, alpha: float, ranks: Mapping[int, int]):
        super().__init__(full_shapes, alpha, ranks)
        self.rounds: dict[int, State] = {}

    def payload(self, client: int, round_number: int, last_round: int | None) -> Payload:
        sent = {f"merge.{n}": s for n, s in sorted(self.rounds.items()) if last_round is None or n >= last_round}
        return Payload({**sent, **self._saved_head()}, {"rank": self._rank(client)})

    def _aggregate_adapters(
        self, round_number: int, states: Mapping[int, State], examples: Mapping[int, float]
    ) -> None:
        self.rounds[round_number] = stack_factors(states, examples, self.alpha)

    def results(self) -> dict[str, State]:
        """Join the updates of all rounds into one adapter: exact, of the sum of their ranks."""
        from .low_rank import concatenate_stacks

        if not self.rounds:
            return {}
        return {
            "global": {**concatenate_stacks([self.rounds[n] for n in sorted(self.rounds)], self.alpha), **self.head}
        }

    def saved(self) -> dict[str, State]:
        return {**{f"round-{number}": state for number, state in self.rounds.items()}, **self._saved_head()}

    def restore(self, arrays: Mapping[str, State]) -> None:
        super().restore(arrays)
        self.rounds = {int(name.removeprefix("round-")): s for name, s in arrays.items() if name != "head"}


def rank_of_shapes(full_shapes: Shapes) -> int:
    return max(full_shapes[f"{path}.A"][0] for path in lora_module_paths(full_shapes))


class TruncatedAverage(RankedStrategy):
    """FlexLoRA: the exact mean, and for every client what of it its rank can hold.

    Source: Bai et al. 2024 (arXiv 2402.11505).
    """

    def __init__(self, full_shapes: Shapes, alpha: float, ranks: Mapping[int, int]):
        super().__init__(full_shapes, alpha, ranks)
        self.merged_state: State = {}  # a stack, whose plain product is the mean
        self._down: dict[int, State] = {}  # by rank, of this round

    def payload(self, client: int, round_number: int, last_round: int | None) -> Payload:
        rank = self._rank(client)
        return Payload({"global": {**self._adapters_at_rank(rank), **self.head}}, {"rank": rank})

    def _adapters_at_rank(self, rank: int) -> State:
        if not self.merged_state:
            return resize_lora_rank(self.initial, rank)
        if rank not in self._down:
            self._down[rank] = truncate_to_rank(self.merged_state, rank, self.alpha)
        return self._down[rank]

    def _aggregate_adapters(
        self, round_number: int, states: Mapping[int, State], examples: Mapping[int, float]
    ) -> None:
        self.merged_state = stack_factors(states, examples, self.alpha)
        self._down.clear()

    def results(self) -> dict[str, State]:
        """The adapter of the largest rank, and the head."""
        if not self.merged_state:
            return {}
        return {"global": {**self._adapters_at_rank(rank_of_shapes(self.full)), **self.head}}

    def saved(self) -> dict[str, State]:
        merged: dict[str, State] = {"whole": self.merged_state} if self.merged_state else {}
        return {"initial": self.initial, **merged, **self._saved_head()}

    def restore(self, arrays: Mapping[str, State]) -> None:
        super().restore(arrays)
        self.initial, self.merged_state = dict(arrays["initial"]), arrays.get("whole", {})


class PaddedAverage(TruncatedAverage):
    """HetLoRA: factors filled up to the largest rank and averaged by the norms of their updates; every client gets
    the first components.

    Source: Cho et al. 2024 (arXiv 2401.06432).
    """

    def _adapters_at_rank(self, rank: int) -> State:
        return resize_lora_rank(self.merged_state or self.initial, rank)

    def _aggregate_adapters(
        self, round_number: int, states: Mapping[int, State], examples: Mapping[int, float]
    ) -> None:
        padded = padded_mean_weighted_by_update_norm(states, examples, self.alpha)
        self.merged_state = resize_lora_rank(padded, rank_of_shapes(self.full))

"""Strategies that put together the products of adapters, not their factors: stacking, FlexLoRA and HetLoRA."""

from collections.abc import Mapping

from .low_rank import (
    modules,
    padded_mean_weighted_by_update_norm,
    rank_of,
    stack_factors,
    truncate_or_pad_rank,
    truncate_to_rank,
)
from .state import Shapes, State, mean
from .strategy import Payload, Strategy, TrainedState, examples_of, states_of


def shapes_at_rank(full_shapes: Shapes, rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of adapters of another rank."""
    result: dict[str, tuple[int, ...]] = {}
    for path in modules(full_shapes):
        result[f"{path}.A"] = (rank, full_shapes[f"{path}.A"][1])
        result[f"{path}.B"] = (full_shapes[f"{path}.B"][0], rank)
    return result


class RankedStrategy(Strategy):
    """Clients whose adapters may have ranks of their own.

    alpha   what an adapter's product is multiplied with, divided by its rank
    ranks   by client; one without a rank has that of `full_shapes`
    """

    def __init__(self, full_shapes: Shapes, alpha: float, ranks: Mapping[int, int]):
        super().__init__(full_shapes)
        self.alpha, self.ranks = alpha, ranks

    def _rank(self, client: int) -> int:
        return self.ranks.get(client) or rank_of_shapes(self.full)


class StackedAverage(RankedStrategy):
    """FLoRA: the exact mean. What a round learned is merged into every client's weights, and new adapters begin.

    The server keeps the stacks of all rounds: a client that has been away gets those that it missed, in their order.
    A head that is trained along goes on from its plain mean.
    Source: Wang et al. 2024 (arXiv 2409.05976).
    """

    starts = False

    def __init__(self, full_shapes: Shapes, alpha: float, ranks: Mapping[int, int]):
        super().__init__(full_shapes, alpha, ranks)
        self.rounds: dict[int, State] = {}
        self.head: State = {}
        inside = {f"{path}.{side}" for path in modules(full_shapes) for side in "AB"}
        self._beside = {name: shape for name, shape in full_shapes.items() if name not in inside}

    def payload(self, client: int, round_number: int, last_round: int | None) -> Payload:
        sent = {f"merge.{n}": s for n, s in sorted(self.rounds.items()) if last_round is None or n >= last_round}
        return Payload({**sent, "head": self.head} if self.head else sent, {"rank": self._rank(client)})

    def required(self, client: int) -> Shapes:
        return {**shapes_at_rank(self.full, self._rank(client)), **self._beside}

    def aggregate(self, round_number: int, client_states: Mapping[int, TrainedState]) -> None:
        self.rounds[round_number] = stack_factors(states_of(client_states), examples_of(client_states), self.alpha)
        heads = {k: {name: s.state[name] for name in self._beside} for k, s in client_states.items()}
        self.head = mean(heads, examples_of(client_states)) if self._beside else {}

    def results(self) -> dict[str, State]:
        """Join the updates of all rounds into one adapter: exact, of the sum of their ranks."""
        from .low_rank import concatenate_stacks

        if not self.rounds:
            return {}
        return {
            "global": {**concatenate_stacks([self.rounds[n] for n in sorted(self.rounds)], self.alpha), **self.head}
        }

    def saved(self) -> dict[str, State]:
        states = {f"round-{number}": state for number, state in self.rounds.items()}
        return {**states, "head": self.head} if self.head else states

    def restore(self, arrays: Mapping[str, State]) -> None:
        self.head = arrays.get("head", {})
        self.rounds = {int(name.removeprefix("round-")): s for name, s in arrays.items() if name != "head"}


def rank_of_shapes(full_shapes: Shapes) -> int:
    return max(full_shapes[f"{path}.A"][0] for path in modules(full_shapes))


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
        if not self.merged_state:
            return Payload({"global": truncate_or_pad_rank(self.initial, rank, self.alpha)}, {"rank": rank})
        if rank not in self._down:
            self._down[rank] = truncate_to_rank(self.merged_state, rank, self.alpha)
        return Payload({"global": self._down[rank]}, {"rank": rank})

    def required(self, client: int) -> Shapes:
        return shapes_at_rank(self.full, self._rank(client))

    def aggregate(self, round_number: int, client_states: Mapping[int, TrainedState]) -> None:
        self.merged_state = stack_factors(states_of(client_states), examples_of(client_states), self.alpha)
        self._down.clear()

    def results(self) -> dict[str, State]:
        return (
            {"global": truncate_to_rank(self.merged_state, rank_of_shapes(self.full), self.alpha)}
            if self.merged_state
            else {}
        )

    def saved(self) -> dict[str, State]:
        return {"initial": self.initial, **({"whole": self.merged_state} if self.merged_state else {})}

    def restore(self, arrays: Mapping[str, State]) -> None:
        self.initial, self.merged_state = dict(arrays["initial"]), arrays.get("whole", {})


class PaddedAverage(TruncatedAverage):
    """HetLoRA: factors filled up to the largest rank and averaged by the norms of their updates; every client gets
    the first components.

    Source: Cho et al. 2024 (arXiv 2401.06432).
    """

    def payload(self, client: int, round_number: int, last_round: int | None) -> Payload:
        rank = self._rank(client)
        return Payload(
            {"global": truncate_or_pad_rank(self.merged_state or self.initial, rank, self.alpha)}, {"rank": rank}
        )

    def aggregate(self, round_number: int, client_states: Mapping[int, TrainedState]) -> None:
        mean = padded_mean_weighted_by_update_norm(states_of(client_states), examples_of(client_states), self.alpha)
        largest = rank_of_shapes(self.full)
        self.merged_state = mean if rank_of(mean) == largest else truncate_or_pad_rank(mean, largest, self.alpha)

    def results(self) -> dict[str, State]:
        return {"global": self.merged_state} if self.merged_state else {}

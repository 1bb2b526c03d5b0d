"""Adapters on the native engine: LoRA and interventions as updates of a plan's registers, by sequence."""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ....dsl.syntax.diagnostics import Fault
from ....kernels.engine_adapters import LowRankUpdate
from ...models.rows.prompt_positions import edited_counts_at_both_ends
from .plan import registers_read_by_step, weights_read_by_step

if TYPE_CHECKING:
    from ....kernels.engine import Engine
    from ..model import DecoderModel

Step = Mapping[str, Any]

unsupported_adapter = Fault(
    "no-place-for-adapters",
    "The native engine's plan has no step at which an adapter of this kind could act.\n\n"
    "LoRA acts on linear layers that are one step each, ReFT on hidden states that alone leave a layer. A model that "
    "torch runs (`hf`, or its own folder) takes both.",
    exit="environment",
)


@dataclass(frozen=True)
class Factors:
    """y += up (down x + bias): down [rank, in], up [out, rank], bias [rank] or None."""

    down: Tensor
    up: Tensor
    bias: Tensor | None = None


def low_rank_updates_of_linears(
    plan: Mapping[str, Any], factors_by_linear_path: Mapping[str, Factors]
) -> list[LowRankUpdate]:
    """Updates of linear layers by their paths. Raises Reject (no-place-for-adapters)."""
    updates = []
    for path, one in factors_by_linear_path.items():
        matches = [s for s in plan["steps"] if s["op"] == "linear" and s["weight"] == f"{path}.weight"]
        if len(matches) != 1:
            raise _unsupported_adapter_rejection(f"`{path:.80}` is no linear step of its own")
        updates.append(LowRankUpdate(matches[0]["x"], matches[0]["to"], one.down, one.up, one.bias))
    return updates


def low_rank_updates_behind_layers(
    plan: Mapping[str, Any], factors_by_layer_path: Mapping[str, Factors]
) -> list[LowRankUpdate]:
    """Updates of hidden states behind layers, by the layers' paths. Raises Reject (no-place-for-adapters)."""
    updates = []
    layers = plan.get("layers", {})  # of a file, which may hold anything
    known = layers if isinstance(layers, Mapping) else {}
    for path, one in factors_by_layer_path.items():
        register = known.get(path) if "layers" in plan else _layer_output_register(plan["steps"], path)
        if type(register) is not int:
            raise _unsupported_adapter_rejection(f"`{path:.80}` has other results than hidden states")
        updates.append(LowRankUpdate(register, register, one.down, one.up, one.bias))
    return updates


def _unsupported_adapter_rejection(problem: str) -> Exception:
    help = "let torch run the model: what `hf` wrote, or its own folder, or `generation: torch` of `rttc`"
    return unsupported_adapter(f"{problem} in the native engine's plan", help=help).rejection()


def _layer_output_register(steps: Sequence[Step], path: str) -> int | None:
    """Of a plan that doesn't name it: the first register behind a layer's own steps from which on it alone is read.

    A guess, which whoever uses it holds against torch: equal vectors of two layers have one name.
    """
    layer_steps = [
        i for i, step in enumerate(steps) if any(name.startswith(f"{path}.") for name in weights_read_by_step(step))
    ]
    if not layer_steps:
        return None
    writer_of = {step["to"]: i for i, step in enumerate(steps)}
    for number in range(layer_steps[-1], len(steps) - 1):
        later = {register for step in steps[number + 1 :] for register in registers_read_by_step(step)}
        if {register for register in later if writer_of[register] <= number} == {steps[number]["to"]}:
            return steps[number]["to"]
    return None


# -- sequences -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineAdapter:
    """Numbers of the engine's adapters for the tokens of a sequence; -1: none.

    first, last   interventions: numbers of the first `n_first` and the last `n_last` tokens of a prompt
    default       of all other tokens; a prompt with edges comes in one call
    """

    default: int = -1
    first: int = -1
    last: int = -1
    n_first: int = 0
    n_last: int = 0

    @property
    def needs_full_prompt(self) -> bool:
        return self.n_first + self.n_last > 0

    def adapter_of_each_token(self, past_length: int, num_tokens: int) -> list[int]:
        """Numbers for so many tokens behind `past_length` others of a sequence: at its begin they are its prompt."""
        if past_length or not self.needs_full_prompt:
            return [self.default] * num_tokens
        front, behind = map(int, edited_counts_at_both_ends(torch.tensor(num_tokens), self.n_first, self.n_last))
        return [self.first] * front + [self.default] * (num_tokens - front - behind) + [self.last] * behind


class AdaptedEngine:
    """An engine's sequences as an `AdaptedDecoder`, each with an adapter or none, all of them in one batch.

    adapters   by their names
    default    name of the adapter of sequences for which none was chosen; "": none
    """

    def __init__(self, engine: "Engine", adapters: Mapping[str, EngineAdapter], default: str = ""):
        self.engine, self._adapters, self._default = engine, {"": EngineAdapter(), **adapters}, default
        self._chosen: dict[int, str] = {}
        self.max_sequences, self.context, self.vocabulary = engine.max_sequences, engine.context, engine.vocabulary

    @property
    def backward(self) -> bool:
        return self.engine.backward

    def needs_full_prompt(self, adapter: str) -> bool:
        return self._adapters[adapter].needs_full_prompt

    def set_sequence_adapter(self, sequence: int, adapter: str) -> None:
        self._chosen[sequence] = adapter

    def run(
        self, token_ids: Sequence[int], sequence_of_token: Sequence[int], output_positions: Sequence[int]
    ) -> Tensor:
        adapters = [number for part in self._adapter_numbers(sequence_of_token) for number in part]
        return self.engine.run(
            token_ids, sequence_of_token, output_positions, adapters if max(adapters, default=-1) >= 0 else None
        )

    def _adapter_numbers(self, sequence_of_token: Sequence[int]) -> Iterator[list[int]]:
        start = 0
        read: dict[int, int] = {}  # tokens of each sequence, those of this call among them
        while start < len(sequence_of_token):
            sequence, end = sequence_of_token[start], start + 1
            while end < len(sequence_of_token) and sequence_of_token[end] == sequence:
                end += 1
            length = read.get(sequence, self.engine.length(sequence))
            yield self._adapters[self._chosen.get(sequence, self._default)].adapter_of_each_token(length, end - start)
            read[sequence], start = length + end - start, end

    def length(self, sequence: int) -> int:
        return self.engine.length(sequence)

    def forget(self, sequence: int, num_remaining: int = 0) -> None:
        self.engine.forget(sequence, num_remaining)

    def cancel(self) -> None:
        self.engine.cancel()


def model_with_adapter(model: "DecoderModel", name: str, adapter: EngineAdapter) -> "DecoderModel":
    """The model with an adapter in all of its sequences: over the same engine, weights and free sequences."""
    adapted: DecoderModel = copy(model)
    adapted.engine = AdaptedEngine(model.engine, {name: adapter}, name)  # type: ignore[arg-type]  # the native one
    adapted.owner = f"adapter {name}"
    adapted.reuses_prompts = not adapter.needs_full_prompt
    return adapted

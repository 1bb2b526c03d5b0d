"""The native engine as a client's voice: the bare model, and one with the adapters of a query, over one engine.

An adapter of the engine is low-rank updates behind linear layers (LoRA) or whole layers (ReFT), at every position.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ....kernels.engine import Engine
from ...models.rows.forward import evaluating, logits
from ...runtimes.model import DecoderModel
from ...runtimes.native.adapters import (
    AdaptedEngine,
    EngineAdapter,
    Factors,
    low_rank_updates_behind_layers,
    low_rank_updates_of_linears,
    model_with_adapter,
)
from ...runtimes.native.opening import open_native
from .adaptation import AdaptableModel, State

# Of root mean squares, between the engine's logits and PyTorch's under the same adapters: bfloat16 weights, keys and
# values are 0.02 apart with no adapter at all, and an adapter at the wrong place, or not scaled, is 0.2 and more.
MAX_ERROR = 0.06
_READY = 4  # states that the engine has: some 18 MB each for LoRA of rank 8 on 135M parameters
_SEQUENCES = 4  # a question as it was looked at, answered and judged, and prompts with samples before it
_REMEMBERED = 2048  # tokens of each
_DOUBLINGS = 9  # of the spread of random adapters, until they move what the model says
_NAME = "state"  # of the adapter that is on


class NativeGenerator:
    """`bare` answers as the model is; `adapted`, where the engine can, by the adapters that were put on last."""

    def __init__(self, bare: DecoderModel, states: "EngineStates | None" = None):
        self.bare, self._states = bare, states

    @property
    def adapted(self) -> DecoderModel | None:
        return self._states.model if self._states else None

    def disable_speculation(self) -> None:
        for model in (self.bare, self.adapted):
            if model is not None:
                model.draft_tokens = 0

    def put(self, state: State) -> None:
        assert self._states is not None, "this voice has no adapters"
        self._states.activate(state)


def open_native_generator(
    folder: Path, adaptable: AdaptableModel | None, threads: int | None = None
) -> NativeGenerator:
    """Open a folder of the target `native` as a generator; adapters are those that `adaptable` trains.

    Raises Reject (no-place-for-adapters) where the plan has none for them.
    """
    sequences = _SEQUENCES * (2 if adaptable else 1)
    bare = open_native(
        folder, threads=threads, max_sequences=sequences, batch_invariant=True, prefix_tokens=sequences * _REMEMBERED
    )  # an answer is the same to the bit, whatever is held of its prompt
    return NativeGenerator(bare, EngineStates(bare, adaptable) if adaptable else None)


class EngineStates:
    """States of adapters on an engine, one of which `model` has.

    model   over the engine of the bare model, and its free sequences
    """

    def __init__(self, bare: DecoderModel, adaptable: AdaptableModel):
        assert isinstance(bare.engine, Engine), f"adapters of {type(bare.engine).__name__}"
        self._engine, self._kind, self._on = bare.engine, adaptable.regime.kind, adaptable.on
        self._scale = adaptable.regime.alpha / adaptable.regime.rank if self._kind == "lora" else 1.0
        self._ready: OrderedDict[int, tuple[State, int, str]] = OrderedDict()
        self._n_created = 0
        self.model = model_with_adapter(bare, _NAME, EngineAdapter())
        self.activate(adaptable.state())

    def activate(self, state: State) -> None:
        """Put on a state of the adapters, which must not be changed afterwards."""
        ready = self._ready.pop(id(state), None)
        if ready is None:
            self._n_created += 1
            ready = state, self._add_adapter(state), f"state {self._n_created}"
        self._ready[id(state)] = ready  # the state is held, so that no other gets its number
        with self.model.exclusive():
            self.model.engine = AdaptedEngine(self._engine, {_NAME: EngineAdapter(default=ready[1])}, _NAME)
            self.model.owner = ready[2]
            if len(self._ready) > _READY:
                _, (_, number, _) = self._ready.popitem(last=False)
                self._engine.remove_adapter(number)

    def _add_adapter(self, state: State) -> int:
        factors = {path: self._factors(path, state) for path in self._on}
        updates = (low_rank_updates_of_linears if self._kind == "lora" else low_rank_updates_behind_layers)(
            self.model.plan, factors
        )
        with self.model.exclusive():
            return self._engine.add_adapter(updates)

    def _factors(self, path: str, state: State) -> Factors:
        if self._kind == "lora":
            return Factors(state[f"{path}.lora_A"], state[f"{path}.lora_B"] * self._scale)
        return Factors(state[f"{path}.aim"], state[f"{path}.project"].T, state[f"{path}.bias"])


# -- equality ------------------------------------------------------------------------------------------------


def relative_logit_error(generator: NativeGenerator, adaptable: AdaptableModel, ids: Sequence[int]) -> float:
    """Relative error of the engine's logits of a prompt against PyTorch's under the same random adapters, as a share of
    root mean squares. The adapters are as large as it takes to move the logits by a third, and off again afterwards."""
    assert generator.adapted is not None, "there are adapters to compare"
    row, first = torch.tensor([list(ids)]), adaptable.state()
    try:
        bare = _logits(adaptable, first, row)
        for doubled in range(_DOUBLINGS):
            draws = torch.Generator().manual_seed(0)
            spread = 0.01 * 2**doubled
            state = {name: t + spread * torch.randn(t.shape, generator=draws).to(t) for name, t in first.items()}
            expected = _logits(adaptable, state, row)
            if _relative_rms_error(expected, bare) > 1 / 3:
                break
        generator.put(state)
        return _relative_rms_error(logits(generator.adapted, row), expected)
    finally:
        adaptable.load_and_enable(first)
        adaptable.disable_adapters()


def _logits(adaptable: AdaptableModel, state: State, row: Tensor) -> Tensor:
    adaptable.load_and_enable(state)
    with evaluating(adaptable.model):
        return logits(adaptable.model, row).float()


def _relative_rms_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())

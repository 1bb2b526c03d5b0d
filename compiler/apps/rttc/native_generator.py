"""The native engine as a client's voice: the bare model, and one whose low-rank steps are written anew for a query.

A plan of the engine is a list of steps over registers. Behind a linear layer (LoRA), or behind a whole layer (ReFT),
three are put in: two small products and a sum. Their weights lie in memory that the engine reads, and `activate_state`
writes there what training left. Both engines read the same large weights, which are in memory once.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....dsl.syntax.diagnostics import Fault
from ....kernels import packed as packing
from ....kernels.engine import Engine
from ...models.rows.forward import evaluating, logits
from ...runtimes.model import DecoderModel
from ...runtimes.native.opening import open_native
from ...runtimes.native.plan import inputs, renumber_registers, weights
from .adaptation import AdaptableModel, State

_KERNEL = "dense_linear"
# Of root mean squares, between the engine's logits and PyTorch's under the same adapters: bfloat16 weights, keys and
# values are 0.02 apart with no adapter at all, and an adapter at the wrong place, or not scaled, is 0.2 and more.
MAX_ERROR = 0.06
_READY = 4  # states that are kept as the engine reads them: some 9 MB each for LoRA of rank 8 on 135M parameters
_SEQUENCES = 4  # a question as it was looked at, answered and judged, and prompts with samples before it
_REMEMBERED = 2048  # tokens of each
_DOUBLINGS = 9  # of the spread of random adapters, until they move what the model says

no_place = Fault(
    "no-place-for-adapters",
    "The native engine's plan has no place at which adapters of this kind could act.\n\n"
    "LoRA acts on linear layers that are one step each, ReFT on hidden states that alone leave a layer.",
    exit="environment",
)

Plan = Mapping[str, Any]


class NativeGenerator:
    """`bare` answers as the model is; `adapted`, where the engine can, by the adapters that were put on last."""

    def __init__(self, bare: DecoderModel, adapted: "AdaptedEngine | None" = None):
        self.bare, self._adapted = bare, adapted

    @property
    def adapted(self) -> DecoderModel | None:
        return self._adapted.model if self._adapted else None

    def disable_speculation(self) -> None:
        for model in (self.bare, self.adapted):
            if model is not None:
                model.draft_tokens = 0

    def put(self, state: State) -> None:
        assert self._adapted is not None, "this voice has no adapters"
        self._adapted.activate_state(state)


def open_native_generator(
    folder: Path, adaptable: AdaptableModel | None, threads: int | None = None
) -> NativeGenerator:
    """Open a folder of the target `native` as a generator; adapters are those that `adaptable` trains.

    Raises Reject (no-place-for-adapters) where the plan has none for them.
    """
    bare = open_native(
        folder, threads=threads, sequences=_SEQUENCES, steady=True, prefix_tokens=_SEQUENCES * _REMEMBERED
    )
    return NativeGenerator(bare, AdaptedEngine(bare, adaptable) if adaptable else None)


class AdaptedEngine:
    """A second engine over the weights of a first, with steps for the adapters."""

    def __init__(self, bare: DecoderModel, adaptable: AdaptableModel):
        assert isinstance(bare.engine, Engine), f"adapters of {type(bare.engine).__name__}"
        self._kind, self._on, regime = adaptable.regime.kind, adaptable.on, adaptable.regime
        self._scale = regime.alpha / regime.rank if self._kind == "lora" else 1.0
        first = adaptable.state()
        plan, shapes = plan_with_adapters(bare.plan, self._kind, self._on, _ranks(self._kind, self._on, first))
        self._parameters = {name: _blank(shape) for name, shape in shapes.items()}
        shared = {name.replace("/", "."): tensor for name, tensor in bare.weights.named_buffers()}
        engine = Engine(
            {**plan}, {**shared, **self._parameters}, bare.engine.threads, _SEQUENCES, copy=False, steady=True
        )  # an answer is the same to the bit, whatever is held of its prompt
        self._ready: OrderedDict[int, tuple[State, dict[str, Tensor], str]] = OrderedDict()
        self._n_created = 0
        generation = {"eos_token_id": bare.generation_config.eos_token_id}
        self.model = DecoderModel(
            engine, plan, self._parameters, bare.facts, _SEQUENCES, generation, remembers=_SEQUENCES * _REMEMBERED
        ).eval()
        self.model.draft_tokens = bare.draft_tokens

    def activate_state(self, state: State) -> None:
        """Write a state of the adapters to where the engine reads it; it must not be changed afterwards."""
        ready = self._ready.pop(id(state), None)
        if ready is None:
            self._n_created += 1
            ready = state, self._pack_adapter_state(state), f"state {self._n_created}"
        for name, tensor in ready[1].items():
            self._parameters[name].copy_(tensor)
        self.model.owner = ready[2]
        self._ready[id(state)] = ready  # the state is held, so that no other gets its number
        if len(self._ready) > _READY:
            self._ready.popitem(last=False)

    def _pack_adapter_state(self, state: State) -> dict[str, Tensor]:
        """Ten times as dear as a copy of what it gives: 21 ms of CPU for LoRA of rank 8 on 30 layers."""
        packed_weights = {}
        for path in self._on:
            low, up, bias = _matrices(self._kind, path, state)
            for name, matrix in ((f"{path}.low", low), (f"{path}.up", up * self._scale)):
                packed_weights[name] = packing.pack(_KERNEL, matrix.contiguous(), threads=1)
            if bias is not None:
                packed_weights[f"{path}.low.bias"] = bias
        return packed_weights


def _matrices(adapter_kind: str, path: str, state: State) -> tuple[Tensor, Tensor, Tensor | None]:
    """[rank, in], [out, rank] and [rank] of a place: what is added to y is up (low x + bias)."""
    if adapter_kind == "lora":
        return state[f"{path}.lora_A"], state[f"{path}.lora_B"], None
    return state[f"{path}.aim"], state[f"{path}.project"].T, state[f"{path}.bias"]


def _ranks(adapter_kind: str, adapters: Sequence[str], state: State) -> dict[str, int]:
    return {path: len(_matrices(adapter_kind, path, state)[0]) for path in adapters}


def _blank(shape: Sequence[int]) -> Tensor:
    return packing.pack(_KERNEL, torch.zeros(*shape), threads=1) if len(shape) == 2 else torch.zeros(*shape)


# -- plans ---------------------------------------------------------------------------------------------------


def plan_with_adapters(
    plan: Plan, adapter_kind: str, adapter_paths: Sequence[str], ranks: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """A plan with steps for adapters behind the places `adapter_paths`, and the shapes of the weights that they read.

    Raises Reject (no-place-for-adapters).
    """
    path_by_step = {_adapted_step_index(plan, adapter_kind, path): path for path in adapter_paths}
    steps: list[dict[str, Any]] = []
    widths: list[int] = []
    register_of: dict[int, int] = {}  # a register of the plan -> the one that stands for it
    shapes: dict[str, tuple[int, ...]] = {}

    def append(width: int, **step: Any) -> int:
        steps.append({**step, "to": len(steps)})
        widths.append(width)
        return len(steps) - 1

    for number, old in enumerate(plan["steps"]):
        width = plan["registers"][old["to"]]
        register_of[old["to"]] = len(steps)
        append(width, **renumber_registers(old, register_of))
        if number not in path_by_step:
            continue
        path = path_by_step[number]
        base = register_of[old["to"]]
        x = steps[-1]["x"] if adapter_kind == "lora" else base
        rank, bias = ranks[path], None if adapter_kind == "lora" else f"{path}.low.bias"
        shapes[f"{path}.low"], shapes[f"{path}.up"] = (rank, widths[x]), (width, rank)
        if bias:
            shapes[bias] = (rank,)
        low = append(rank, op="linear", x=x, weight=f"{path}.low", bias=bias)
        up = append(width, op="linear", x=low, weight=f"{path}.up", bias=None)
        register_of[old["to"]] = append(width, op="add", x=base, y=up)
    return {**plan, "steps": steps, "registers": widths, "logits": register_of[plan["logits"]]}, shapes


def _adapted_step_index(plan: Plan, adapter_kind: str, path: str) -> int:
    """The number of the step behind which adapters act."""
    step_index = _linear(plan, path) if adapter_kind == "lora" else _layer_output_step_index(plan, path)
    if step_index is None:
        problem = "is no linear step of its own" if adapter_kind == "lora" else "has other results than hidden states"
        raise no_place(
            f"`{path}` {problem} in the native engine's plan", help="`generation: torch` lets PyTorch answer"
        ).rejection()
    return step_index


def _linear(plan: Plan, path: str) -> int | None:
    steps = plan["steps"]
    matches = [i for i, step in enumerate(steps) if step["op"] == "linear" and step["weight"] == f"{path}.weight"]
    return matches[0] if len(matches) == 1 else None


def _layer_output_step_index(plan: Plan, path: str) -> int | None:
    """The first step behind all of a layer's own from which on one register alone, that step's, is read."""
    steps = plan["steps"]
    layer_steps = [i for i, step in enumerate(steps) if any(name.startswith(f"{path}.") for name in weights(step))]
    if not layer_steps:
        return None
    writer_of = {step["to"]: i for i, step in enumerate(steps)}
    for number in range(layer_steps[-1], len(steps) - 1):
        later = {register for step in steps[number + 1 :] for register in inputs(step)}
        if {register for register in later if writer_of[register] <= number} == {steps[number]["to"]}:
            return number
    return None


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
            if _distance(expected, bare) > 1 / 3:
                break
        generator.put(state)
        return _distance(logits(generator.adapted, row), expected)
    finally:
        adaptable.put(first)
        adaptable.off()


def _logits(adaptable: AdaptableModel, state: State, row: Tensor) -> Tensor:
    adaptable.put(state)
    with evaluating(adaptable.model):
        return logits(adaptable.model, row).float()


def _distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())

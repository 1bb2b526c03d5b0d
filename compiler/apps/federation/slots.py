"""Places in a model where a client's state is put, run and trained: adapters, a soft prompt, the weights themselves."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ...ir.layers.reft import FORMS, Intervention, interventions
from ...ir.surgery import tensor_at
from ...models.checkpoints.pretrained import pretrained
from ...models.rows.inputs import use_cache_false_kwargs
from ...models.rows.prompt_positions import parameters_above_body
from ...transforms.training.adapters import AdapterShape, with_adapters
from ...transforms.training.schedule import seed_of
from .low_rank import lora_module_paths
from .state import Shapes, State

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


class Slots(ABC):
    """
    model    what runs with the state in it
    full     shapes of a whole state
    """

    model: nn.Module
    full: Shapes

    @abstractmethod
    def initial_state(self, seed: int, rank: int | None) -> State:
        """A state to start from: one that changes nothing, where there is such a state."""

    @abstractmethod
    def load_state(self, state: State, delta: State) -> None:
        """Put a state into the model, over a base to which `delta` ([out, in] by module) was added."""

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the model that belong to the state, by the names of its arrays."""

    def project_after_training(self) -> None:  # noqa: B027 (most have nothing to do)
        """After training: let parameters be what they stand for."""


def _seeded_generator(seed: int, name: str) -> np.random.Generator:
    """NumPy's streams are the same on every machine, and so is what clients start from."""
    return np.random.default_rng(seed_of("slots", seed, name))


class LowRankSlots(Slots):
    """Adapters, as peft has them; a state may be of any rank."""

    def __init__(self, model: nn.Module, layers: "Mapping[str, LoraLayer]", full_shapes: Shapes, alpha: float):
        self.model, self.layers, self.full, self.alpha = model, layers, full_shapes, alpha
        self.base: dict[str, Tensor] = {}  # weights before anything was added

    @staticmethod
    @contextmanager
    def attached(model: nn.Module, full_shapes: Shapes, alpha: float) -> "Iterator[LowRankSlots]":
        """Adapters on a model; afterwards it is as it was."""
        rank = max(full_shapes[f"{path}.A"][0] for path in lora_module_paths(full_shapes))
        with with_adapters(model, tuple(lora_module_paths(full_shapes)), AdapterShape(rank, alpha, 0.0), 0) as adapters:
            slots = LowRankSlots(model, adapters.layers, full_shapes, alpha)
            try:
                yield slots
            finally:
                slots._set_base_deltas({})

    def initial_state(self, seed: int, rank: int | None) -> State:
        """A as peft draws it (uniform within 1 / sqrt(inputs)), B zero."""
        state = {}
        for path in lora_module_paths(self.full):
            full_rank, inputs = self.full[f"{path}.A"]
            bound = 1 / np.sqrt(inputs)
            shape = (rank or full_rank, inputs)
            state[f"{path}.A"] = _seeded_generator(seed, path).uniform(-bound, bound, shape).astype(np.float32)
            state[f"{path}.B"] = np.zeros((self.full[f"{path}.B"][0], rank or full_rank), np.float32)
        return state

    @torch.no_grad()
    def load_state(self, state: State, delta: State) -> None:
        for path, layer in self.layers.items():
            name, factors = _adapter_matrices(layer)
            layer.scaling[name] = self.alpha / len(state[f"{path}.A"])
            for side, part in factors.items():
                new = torch.from_numpy(state[f"{path}.{side}"]).to(part.get_parameter("weight"), copy=True)
                part.weight = nn.Parameter(new)
        self._set_base_deltas(delta)

    def _set_base_deltas(self, deltas: State) -> None:
        for path, layer in self.layers.items():
            if path in deltas or path in self.base:
                weight = tensor_at(layer.get_base_layer(), "weight")
                before = self.base.setdefault(path, weight.detach().clone())
                delta = torch.from_numpy(deltas[path]) if path in deltas else torch.zeros(())
                turned = delta.T if getattr(layer, "fan_in_fan_out", False) and path in deltas else delta
                weight.data = before + turned.to(before)

    def parameters(self) -> dict[str, nn.Parameter]:
        result: dict[str, nn.Parameter] = {}
        for path, layer in self.layers.items():
            result |= {
                f"{path}.{side}": part.get_parameter("weight") for side, part in _adapter_matrices(layer)[1].items()
            }
        return result


def _adapter_matrices(layer: "LoraLayer") -> tuple[str, dict[str, nn.Module]]:
    """The name of its only adapter, and what that is made of."""
    (name,) = layer.lora_A
    return name, {"A": layer.lora_A[name], "B": layer.lora_B[name]}


class ParameterSlots(Slots):
    """Parameters of the model as they are; a state begins with what they were."""

    def __init__(self, model: nn.Module, full_shapes: Shapes):
        self.model, self.full = model, full_shapes
        self.start = {name: p.detach().float().cpu().numpy().copy() for name, p in self.parameters().items()}

    def initial_state(self, seed: int, rank: int | None) -> State:
        return {name: array.copy() for name, array in self.start.items()}

    @torch.no_grad()
    def load_state(self, state: State, delta: State) -> None:
        for name, parameter in self.parameters().items():
            parameter.copy_(torch.from_numpy(state[name]))


class Edited(ParameterSlots):
    """Interventions that the model has; their rows R are orthonormal whenever a state leaves it."""

    def __init__(self, model: nn.Module, full_shapes: Shapes):
        self.functions = interventions_by_path(model)
        super().__init__(model, full_shapes)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            name: p
            for path, function in self.functions.items()
            for name, p in intervention_parameters(path, function).items()
        }

    def project_after_training(self) -> None:
        for function in self.functions.values():
            function.store_orthonormal_rows()


def interventions_by_path(model: nn.Module) -> dict[str, Intervention]:
    """The functions of a model's interventions by path."""
    return {
        f"{path}.functions.{name}": function
        for path, module in interventions(model)
        for name, function in module.functions.items()
        if isinstance(function, Intervention)
    }


def intervention_parameters(path: str, function: Intervention) -> dict[str, nn.Parameter]:
    """The parameters of a function under the names that rotations.py knows: R where rows are orthonormal, else V."""
    project = "R" if FORMS[function.form].orthonormal else "V"
    result = {f"{path}.{project}": function.project, f"{path}.b": function.bias}
    return result if function.aim is None else {**result, f"{path}.W": function.aim}


class ClassifierSlots(Slots):
    """Slots of a model that ends in a head over whole rows, which is trained along and sent with the rest."""

    def __init__(self, inner: Slots, full_shapes: Shapes):
        self.inner, self.model, self.full = inner, inner.model, full_shapes
        self.trained = {name: p for name, p in parameters_above_body(inner.model).items() if name in full_shapes}
        self.start = {name: p.detach().float().cpu().numpy().copy() for name, p in self.trained.items()}

    def initial_state(self, seed: int, rank: int | None) -> State:
        return {**self.inner.initial_state(seed, rank), **{name: array.copy() for name, array in self.start.items()}}

    @torch.no_grad()
    def load_state(self, state: State, delta: State) -> None:
        self.inner.load_state(state, delta)
        for name, parameter in self.trained.items():
            parameter.copy_(torch.from_numpy(state[name]))

    def parameters(self) -> dict[str, nn.Parameter]:
        return {**self.inner.parameters(), **self.trained}

    def project_after_training(self) -> None:
        self.inner.project_after_training()


class AllWeights(ParameterSlots):
    """All weights of the model, or those of the names given."""

    def __init__(self, model: nn.Module, full_shapes: Shapes):
        parameters = dict(model.named_parameters())
        self.trained = {name: parameters[name] for name in full_shapes}
        super().__init__(model, full_shapes)

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.trained


class SoftPromptModel(nn.Module):
    """A language model behind rows of embeddings that are no words: logits of the words alone.

    Source: prompt tuning, Lester et al. 2021 (arXiv 2104.08691).
    """

    def __init__(self, model: nn.Module, prompt: Tensor):
        super().__init__()
        self.model, self.prompt = model, nn.Parameter(prompt)  # [m, d]
        self.config = model.config

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> tuple[Tensor]:
        words = pretrained(self.model).get_input_embeddings()(input_ids)  # [b, t, d]
        front = self.prompt.to(words.dtype).expand(len(words), *self.prompt.shape)
        output = self.model(inputs_embeds=torch.cat([front, words], 1), **use_cache_false_kwargs(self.model))
        return (output.logits[:, len(self.prompt) :],)


class SoftPrompt(Slots):
    """Embeddings in front of every row; the model itself never changes."""

    def __init__(self, model: nn.Module, full_shapes: Shapes):
        self.full = full_shapes
        self.words = pretrained(model).get_input_embeddings().get_parameter("weight")
        self.model: SoftPromptModel = SoftPromptModel(
            model, torch.zeros(full_shapes["prompt"], device=self.words.device)
        )

    def initial_state(self, seed: int, rank: int | None) -> State:
        """Embeddings of tokens drawn by the seed."""
        ids = _seeded_generator(seed, "prompt").integers(len(self.words), size=self.full["prompt"][0])
        return {"prompt": self.words.detach()[torch.from_numpy(ids)].float().cpu().numpy()}

    @torch.no_grad()
    def load_state(self, state: State, delta: State) -> None:
        self.model.prompt.copy_(torch.from_numpy(state["prompt"]))

    def parameters(self) -> dict[str, nn.Parameter]:
        return {"prompt": self.model.prompt}

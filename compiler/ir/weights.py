"""A model's tensors by name: each storage once, and other tensors in their place."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from ..core.cache import canonical_json_sha256, tensor_hash
from .layers.linear import check_and_copy_packed_weights
from .layers.reft import interventions


@runtime_checkable
class HasWeightSizes(Protocol):
    """A model whose weights are no parameters of its modules, as those of an engine: it counts them itself.

    n_params       numbers that it stands for, each once; None where its file does not say
    stored_bytes   bytes of its weights as they are stored; None where they are the tensors of its modules
    """

    n_params: int | None
    stored_bytes: int | None


def distinct_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and saved buffers, each storage once, in order of registration."""
    visited = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in visited:
            visited.add(id(tensor))
            yield name, tensor


def model_weights_hash(model: nn.Module) -> str:
    """sha256 over all tensors of a model by name, interventions left out."""
    inside = tuple(f"{path}." for path, _ in interventions(model))
    return canonical_json_sha256(
        sorted((name, tensor_hash(t)) for name, t in distinct_tensors(model) if not name.startswith(inside))
    )


def assign_tensors(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Put tensors in place of parameters and buffers by name, and of everything that is tied to them."""
    old = dict(model.state_dict(keep_vars=True))
    new = {id(old[name]): _as_parameter_like(old[name], value) for name, value in values.items()}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in tables:
            for key, tensor in store.items():
                if id(tensor) in new:
                    store[key] = new[id(tensor)]
    check_and_copy_packed_weights(model)


def _as_parameter_like(old: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value

"""A model with numbers that stand in for its weights, from a config alone.

Large weights are one row, repeated without taking memory; what decides what a model is (norms, tables of positions,
sinks) is small, and has numbers of its own.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .meta_init import registering_parameters_on_meta

_MAX_NUMEL = 1 << 16  # numbers of a tensor that gets its own; a larger one gets a row


def build_with_random_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """The model that `build` makes, with random numbers on the CPU that take no room; tensors that are one stay one."""
    with registering_parameters_on_meta():
        model = build().eval()
    generator, known = torch.Generator().manual_seed(0), dict[int, nn.Parameter]()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in known:
                    known[id(parameter)] = nn.Parameter(_random_values_like(parameter, generator), requires_grad=False)
                module._parameters[name] = known[id(parameter)]
    return model


def _random_values_like(bare: Tensor, generator: torch.Generator) -> Tensor:
    is_small = bare.numel() <= _MAX_NUMEL
    values = torch.rand(bare.shape if is_small else bare.shape[-1:], generator=generator).add(0.5).to(bare.dtype)
    return values if is_small else values.expand(bare.shape)

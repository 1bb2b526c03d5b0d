"""Modules without weights: parameters on the meta device, but buffers real.

Under `torch.device("meta")` the tables that a model computes for itself (rotary frequencies, biases of
positions) would be lost, and no checkpoint holds them. Here they are as the constructor made them, and passes
that cut them cut real values.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .checkpoint import build_model_from_config, config_and_model_class, unknown_architecture


def build_meta_model(config: Mapping[str, Any], dtype: str) -> nn.Module:
    """The transformers model of a config; a parameter exists for no longer than it takes to register it.

    The config may come from a file that anyone wrote: only transformers' own model classes are made.
    """
    kind = config_and_model_class(config)[1]
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        names = ", ".join(map(str, config.get("architectures") or ()))
        raise unknown_architecture(
            f"{names} is no model class of transformers", help="name one in `architectures` of config.json"
        ).rejection()
    with registering_parameters_on_meta():
        return build_model_from_config(config, dtype)


def resized_unsaved_buffers(model: nn.Module, resized_names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Tables that no checkpoint holds, yet were cut: they must be stored, as which part is left is not recorded."""
    saved = model.state_dict(keep_vars=True)
    return {name: b for name, b in model.named_buffers() if name in set(resized_names) and name not in saved}


@contextmanager
def without_storage() -> Iterator[None]:
    """All that a constructor makes is on the meta device, even what it asks of the CPU by `torch.FloatTensor`."""
    with torch.device("meta"), registering_parameters_on_meta():
        yield


@contextmanager
def registering_parameters_on_meta() -> Iterator[None]:
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":  # a tied one stays the same object
            bare = torch.empty_like(parameter, device="meta")
            module._parameters[name] = nn.Parameter(bare, requires_grad=parameter.requires_grad)

    torch_module: Any = nn.Module  # whose method is another one for a while
    torch_module.register_parameter = register_on_meta
    try:
        yield
    finally:
        torch_module.register_parameter = register

"""Small models that lie beside a model: encoders of sentences and judges, opened by the class that a table has."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import (
    attn_implementation_of_class,
    config_and_model_class,
    from_pretrained_with_weights,
    refuse_oversized_module,
    transformers_errors_as_invalid_config,
    without_library_logs,
)
from .config_bounds import refuse_excessive_config_numbers
from .model_folder import read_model_config, refuse_adapter_folder
from .tensor_files import iterate_mapped_tensors
from .weights import read_weight_headers


def open_model_with_head(folder: Path, table: Mapping[type, Any], label: str) -> nn.Module:
    """The model of a folder in float32, of the class that one of transformers' tables of heads has for its config.

    Its config comes from anybody: sizes are those that its weights have room for, attention is effc's choice, kernels,
    quantisation and code of its author are left out, an adapter that would name another model is refused.
    """
    refuse_adapter_folder(folder, label)
    config, weights = read_model_config(folder / "config.json", label), read_weight_headers(folder, label)
    refuse_excessive_config_numbers(config, weights.slots, label)
    parsed, _ = config_and_model_class(config)
    with without_library_logs(), transformers_errors_as_invalid_config(label):
        kind = table[type(parsed)]
        with torch.device("meta"):
            refuse_oversized_module(kind(parsed), weights.count)
        return from_pretrained_with_weights(
            kind,
            parsed,
            folder,
            dict(iterate_mapped_tensors(weights)),
            attn_implementation=attn_implementation_of_class(kind, parsed),
            dtype=torch.float32,
        ).eval()

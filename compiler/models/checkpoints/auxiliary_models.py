"""Small models that lie beside a model: encoders of sentences and judges, opened by the class that a table has."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import (
    attention_implementation,
    check_module_size,
    from_pretrained_files,
    library_errors_as_diagnostics,
    parse_config,
    quiet_libraries,
)
from .config_bounds import check_config_numbers
from .model_folder import read_config, refuse_adapter
from .weights import find_weights


def open_model_with_head(folder: Path, table: Mapping[type, Any], label: str) -> nn.Module:
    """The model of a folder in float32, of the class that one of transformers' tables of heads has for its config.

    Its config comes from anybody: sizes are those that its weights have room for, attention is effc's choice, kernels,
    quantisation and code of its author are left out, an adapter that would name another model is refused.
    """
    refuse_adapter(folder, label)
    config, weights = read_config(folder / "config.json", label), find_weights(folder, label)
    check_config_numbers(config, weights.slots, label)
    parsed, _ = parse_config(config)
    with quiet_libraries(), library_errors_as_diagnostics(label):
        kind = table[type(parsed)]
        with torch.device("meta"):
            check_module_size(kind(parsed), weights.count)
        return from_pretrained_files(
            kind,
            parsed,
            folder,
            weights,
            attn_implementation=attention_implementation(kind, parsed),
            dtype=torch.float32,
        ).eval()

"""Small models that lie beside a model: encoders of sentences and judges, opened by the class that a table has."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import attention, check_size, from_files, library, parse_config, quiet
from .config_bounds import check_numbers
from .model_folder import read_config, refuse_adapter
from .weights import find_weights


def open_headed(folder: Path, table: Mapping[type, Any], label: str) -> nn.Module:
    """The model of a folder in float32, of the class that one of transformers' tables of heads has for its config.

    Its config comes from anybody: sizes are those that its weights have room for, attention is effc's choice, kernels,
    quantisation and code of its author are left out, an adapter that would name another model is refused.
    """
    refuse_adapter(folder, label)
    config, weights = read_config(folder / "config.json", label), find_weights(folder, label)
    check_numbers(config, weights.slots, label)
    parsed, _ = parse_config(config)
    with quiet(), library(label):
        kind = table[type(parsed)]
        with torch.device("meta"):
            check_size(kind(parsed), weights.count)
        return from_files(
            kind, parsed, folder, weights, attn_implementation=attention(kind, parsed), dtype=torch.float32
        ).eval()

"""Checkpoint folders of transformers models, with stock or other shapes: how they are checked and opened."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..plugin.target import LoadRequest, Target


class CheckpointTarget(Target):
    """Base of targets whose models lie in `model/`, `compat/` or `compact/`."""

    @classmethod
    def check_folder(cls, folder: Path) -> None:
        (check_compact_folder if folder.name == "compact" else check_checkpoint_folder)(folder)

    @classmethod
    def open(cls, folder: Path, load_request: LoadRequest) -> tuple[Any, Any]:
        from ..ir.layers.fast_mixers import use_mixer_kernels
        from .compact_config import read_compact_record
        from .model_loading import load_compact_model, load_stock_model

        versions = None
        if folder.name in ("model", "compat"):
            model: Any = load_stock_model(folder, load_request.dtype)
        else:
            body = read_compact_record(folder)
            model, versions = load_compact_model(folder, body, load_request.dtype), body.get("versions", {})
        if load_request.kernels:
            use_mixer_kernels(model)
        return model, versions


def check_checkpoint_folder(folder: Path) -> None:
    """Raise Reject where a folder in the Hugging Face layout is no model, or its config and its weights differ."""
    from ..models.checkpoints.checkpoint import config_and_model_class
    from ..models.checkpoints.config_bounds import refuse_excessive_config_numbers
    from ..models.checkpoints.model_folder import read_model_config, refuse_adapter_folder
    from ..models.checkpoints.weights import read_weight_headers

    config, weights = read_model_config(folder / "config.json", str(folder)), read_weight_headers(folder, str(folder))
    refuse_adapter_folder(folder, str(folder))
    refuse_excessive_config_numbers(config, weights.slots, str(folder))
    config_and_model_class(config)
    _check_shapes(config, {name: slot.shape for name, slot in weights.slots.items()}, str(folder))


def _check_shapes(config: dict[str, Any], stored: Mapping[str, tuple[int, ...]], label: str) -> None:
    """Raises Reject (other-weights) where a model of the config, without storage, has other shapes than the weights of
    its names, or far more numbers."""
    import torch

    from ..models.checkpoints.checkpoint import (
        build_model_from_config,
        refuse_mismatched_weights,
        refuse_oversized_module,
    )

    with torch.device("meta"):
        module = build_model_from_config(config, "float32")
    refuse_oversized_module(module, sum(math.prod(shape) for shape in stored.values()))
    tensors = module.state_dict()
    both = [(name, shape, tuple(tensors[name].shape)) for name, shape in stored.items() if name in tensors]
    other = [(name, shape, expected) for name, shape, expected in both if tuple(shape) != expected]
    refuse_mismatched_weights({"mismatched_keys": other, "missing_keys": (), "unexpected_keys": ()}, label)


def check_compact_folder(folder: Path) -> None:
    """Raise Reject where the edits that a compact folder records can't be replayed on the config beside them."""
    from ..ir import graph_json
    from ..ir.edits import Edits
    from ..models.checkpoints.checkpoint import config_and_model_class
    from ..models.checkpoints.config_bounds import refuse_excessive_config_numbers
    from ..models.checkpoints.weights import read_weight_headers
    from .compact_config import read_compact_record
    from .model_loading import SPARE, make_empty_edited_model

    record = read_compact_record(folder)
    refuse_excessive_config_numbers(
        record["base"], read_weight_headers(folder, str(folder)).slots, str(folder), size_factor=SPARE
    )
    config_and_model_class(record["base"])
    for entry in Edits.from_json(record["edits"]).graphs.values():
        graph_json.graph_from_json(entry["graph"])
    make_empty_edited_model(folder, record)

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
        (check_compact if folder.name == "compact" else check_checkpoint)(folder)

    @classmethod
    def open(cls, folder: Path, load_request: LoadRequest) -> tuple[Any, Any]:
        from ..ir.layers.fast_mixers import use_kernels
        from .compact_config import read_record
        from .model_loading import load_compact_model, load_stock_model

        versions = None
        if folder.name in ("model", "compat"):
            model: Any = load_stock_model(folder, load_request.dtype)
        else:
            body = read_record(folder)
            model, versions = load_compact_model(folder, body, load_request.dtype), body.get("versions", {})
        if load_request.kernels:
            use_kernels(model)
        return model, versions


def check_checkpoint(folder: Path) -> None:
    """Raise Reject where a folder in the Hugging Face layout is no model, or its config and its weights differ."""
    from ..models.checkpoints.checkpoint import parse_config
    from ..models.checkpoints.config_bounds import check_config_numbers
    from ..models.checkpoints.model_folder import read_config, refuse_adapter
    from ..models.checkpoints.weights import find_weights

    config, weights = read_config(folder / "config.json", str(folder)), find_weights(folder, str(folder))
    refuse_adapter(folder, str(folder))
    check_config_numbers(config, weights.slots, str(folder))
    parse_config(config)
    _check_shapes(config, {name: slot.shape for name, slot in weights.slots.items()}, str(folder))


def _check_shapes(config: dict[str, Any], stored: Mapping[str, tuple[int, ...]], label: str) -> None:
    """Raises Reject (other-weights) where a model of the config, without storage, has other shapes than the weights of
    its names, or far more numbers."""
    import torch

    from ..models.checkpoints.checkpoint import build_module, check_loading_info, check_module_size

    with torch.device("meta"):
        module = build_module(config, "float32")
    check_module_size(module, sum(math.prod(shape) for shape in stored.values()))
    tensors = module.state_dict()
    both = [(name, shape, tuple(tensors[name].shape)) for name, shape in stored.items() if name in tensors]
    other = [(name, shape, expected) for name, shape, expected in both if tuple(shape) != expected]
    check_loading_info({"mismatched_keys": other, "missing_keys": (), "unexpected_keys": ()}, label)


def check_compact(folder: Path) -> None:
    """Raise Reject where the edits that a compact folder records can't be replayed on the config beside them."""
    from ..ir import graph_json
    from ..ir.edits import Edits
    from ..models.checkpoints.checkpoint import parse_config
    from ..models.checkpoints.config_bounds import check_config_numbers
    from ..models.checkpoints.weights import find_weights
    from .compact_config import read_record
    from .model_loading import SPARE, empty_edited_model

    record = read_record(folder)
    check_config_numbers(record["base"], find_weights(folder, str(folder)).slots, str(folder), spare=SPARE)
    parse_config(record["base"])
    for entry in Edits.from_json(record["edits"]).graphs.values():
        graph_json.graph_from_json(entry["graph"])
    empty_edited_model(folder, record)

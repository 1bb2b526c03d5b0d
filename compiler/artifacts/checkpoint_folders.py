"""Checkpoint folders of transformers models, with stock or other shapes: how they are checked and opened."""

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

    @classmethod
    def stored_bytes(cls, folder: Path) -> int | None:
        """Bytes of packed weights, which are opened as dense ones; None of others."""
        from ..models.checkpoints.model_folder import read_model_config
        from ..models.checkpoints.pack_quantized import schemes_of_config
        from ..models.checkpoints.weights import read_weight_headers

        config = read_model_config(folder / "config.json", str(folder))
        return read_weight_headers(folder, str(folder)).bytes if schemes_of_config(config, str(folder)) else None


def check_checkpoint_folder(folder: Path) -> None:
    """Raise Reject where a folder in the Hugging Face layout is no model, or its config and its weights differ.

    Names and shapes are compared as transformers reads them, so the weights are mapped into a model.
    """
    from .model_loading import load_stock_model

    load_stock_model(folder, None)


def check_compact_folder(folder: Path) -> None:
    """Raise Reject where the edits that a compact folder records can't be replayed on the config beside them, or its
    tensors are not those of the edited model."""
    from ..ir import graph_json
    from ..ir.edits import Edits
    from ..ir.layers.linear import refuse_damaged_packed_weights
    from ..models.checkpoints.checkpoint import config_and_model_class
    from ..models.checkpoints.config_bounds import refuse_excessive_config_numbers
    from ..models.checkpoints.meta_init import resized_unsaved_buffers
    from ..models.checkpoints.weights import read_weight_headers
    from .compact_config import read_compact_record
    from .model_loading import SPARE, checked_tensors, make_empty_edited_model

    record = read_compact_record(folder)
    refuse_excessive_config_numbers(
        record["base"], read_weight_headers(folder, str(folder)).slots, str(folder), size_factor=SPARE
    )
    config_and_model_class(record["base"])
    for entry in Edits.from_json(record["edits"]).graphs.values():
        graph_json.graph_from_json(entry["graph"])
    model, edits, weights = make_empty_edited_model(folder, record)
    stored = checked_tensors(model, folder, weights, resized_unsaved_buffers(model, edits.shapes))
    refuse_damaged_packed_weights(model, stored)

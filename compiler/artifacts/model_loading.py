"""Models from the folders of an artifact: what transformers reads itself, and what is rebuilt from a config and edits.

The folders may come from anybody: sizes are held against the weights that are there before anything is built.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...dsl.syntax.diagnostics import Fault
from ..core.json_errors import reject_on_error
from .compact_config import not_sealed, patch_save_pretrained

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..ir.edits import Edits
    from ..models.checkpoints.weights import Weights

SPARE = 64  # times as large as its stored weights may a model have been before it was edited

tensors_differ = Fault(
    "tensors-differ", "The tensors of a folder are not those that its record asks for.", exit="environment"
)


def load_stock_model(folder: Path, dtype: "torch.dtype | None") -> "PreTrainedModel":
    """A folder that transformers reads itself."""
    from ..models.checkpoints.checkpoint import load_by_from_pretrained, refuse_mismatched_weights
    from ..models.checkpoints.config_bounds import refuse_excessive_config_numbers
    from ..models.checkpoints.model_folder import read_model_config, refuse_adapter_folder
    from ..models.checkpoints.weights import read_weight_headers

    config, weights = read_model_config(folder / "config.json", str(folder)), read_weight_headers(folder, str(folder))
    refuse_adapter_folder(folder, str(folder))
    refuse_excessive_config_numbers(config, weights.slots, str(folder))
    model, info = load_by_from_pretrained(
        folder, config, weights, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True
    )
    refuse_mismatched_weights(info, str(folder))
    return model.eval()


def load_compact_model(
    folder: Path, record: Mapping[str, Any], dtype: "torch.dtype | None" = None
) -> "PreTrainedModel":
    """The blank original, edited again, with the folder's weights mapped in."""
    from ..models.checkpoints.meta_init import resized_unsaved_buffers
    from ..models.checkpoints.pretrained import pretrained

    model, edits, weights = make_empty_edited_model(folder, record)
    map_checked_weights(model, folder, weights, resized_unsaved_buffers(model, edits.shapes), dtype)
    patch_save_pretrained(model, record)
    _add_pretrained_attributes(model, folder)
    return pretrained(model.eval())


def make_empty_edited_model(folder: Path, record: Mapping[str, Any]) -> "tuple[Any, Edits, Weights]":
    """The blank original with a record's edits, without storage, these edits, and the folder's weights.

    Raises Reject where the folder's weights are too few for such a model, or the edits are none of it.
    """
    import torch

    from ..ir.edits import Edits, replay_edits
    from ..models.checkpoints.checkpoint import build_model_from_config, refuse_oversized_module
    from ..models.checkpoints.config_bounds import refuse_excessive_config_numbers
    from ..models.checkpoints.meta_init import build_meta_model
    from ..models.checkpoints.weights import read_weight_headers

    weights = read_weight_headers(folder, str(folder))
    refuse_excessive_config_numbers(record["base"], weights.slots, str(folder), size_factor=SPARE)
    with torch.device("meta"):
        refuse_oversized_module(
            build_model_from_config(record["base"], record["dtype"]), weights.count, size_factor=SPARE
        )
    model = build_meta_model(record["base"], record["dtype"])
    edits = Edits.from_json(record["edits"])
    with reject_on_error(
        not_sealed, f"{folder / 'config.json'} has edits that this effc can't replay", "install the effc that wrote it"
    ):
        replay_edits(model, edits)
    return model, edits, weights


def map_checked_weights(
    model: Any,
    folder: Path,
    weights: "Weights",
    tables: "Mapping[str, torch.Tensor]",
    dtype: "torch.dtype | None" = None,
) -> None:
    """Map the folder's tensors into the model; Reject unless they are the model's, name by name."""
    from ..ir.surgery import replace_tensor_everywhere
    from ..ir.weights import assign_tensors, distinct_tensors

    stored = checked_tensors(model, folder, weights, tables)
    parameters = {name: stored[name] for name, _ in distinct_tensors(model) if name not in tables}
    assign_tensors(model, {n: t.to(dtype) if dtype and t.is_floating_point() else t for n, t in parameters.items()})
    for name in tables:
        replace_tensor_everywhere(model, name, stored[name])


def checked_tensors(
    model: Any, folder: Path, weights: "Weights", tables: "Mapping[str, torch.Tensor]"
) -> "dict[str, torch.Tensor]":
    """The folder's tensors by name, mapped. Reject (tensors-differ) unless they are the model's and its tables."""
    from ..ir.weights import distinct_tensors
    from ..models.checkpoints.tensor_files import iterate_mapped_tensors

    expected = {**dict(distinct_tensors(model)), **tables}
    stored = dict(iterate_mapped_tensors(weights))
    known = model.state_dict(keep_vars=True).keys() | expected.keys()
    problems = [f"`{n}` is missing" for n in expected if n not in stored]
    problems += [f"`{n}` has no place in the model" for n in stored if n not in known]
    problems += [
        f"`{n}` is {tuple(stored[n].shape)} in the file and {tuple(w.shape)} in the model"
        for n, w in expected.items()
        if n in stored and stored[n].shape != w.shape
    ]
    if problems:
        further = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise tensors_differ(
            f"{folder}: {', '.join(problems[:3])}{further}",
            help="weights and config.json are of different saves: copy both again",
        ).rejection()
    return stored


def _add_pretrained_attributes(model: Any, folder: Path) -> None:
    """Add what `from_pretrained` adds to a bare model."""
    from transformers import GenerationConfig

    from ..models.checkpoints.checkpoint import transformers_errors_as_invalid_config
    from ..models.checkpoints.generation_config import read_generation_config

    if model.can_generate() and (folder / "generation_config.json").is_file():
        with transformers_errors_as_invalid_config(str(folder)):
            read_generation_config(folder)
            model.generation_config = GenerationConfig.from_pretrained(folder)
    model.name_or_path = model.config.name_or_path = str(folder)

"""Names of axes that may have any length, as other writers of ONNX have them, in place of the exporter's symbols."""

import re
from typing import Any

_SYMBOL = re.compile(r"\bs\d+\b")
_LENGTHS = {
    "input_ids": "sequence_length",
    "position_ids": "sequence_length",
    "decoder_input_ids": "decoder_sequence_length",
    "encoder_attention_mask": "encoder_sequence_length",
    "encoder_hidden_states": "encoder_sequence_length",
}


def rename_symbolic_axes(model: Any) -> None:
    """Rename symbols everywhere in a model of `onnx_ir`: `past_sequence_length + sequence_length` for `s13 + s57`."""
    values = [*model.graph.inputs, *model.graph.outputs, *(v for n in model.graph.all_nodes() for v in n.outputs)]
    has_past = any(value.name.startswith("past") for value in model.graph.inputs)
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for dim, name in zip(value.shape or (), _axis_names(value.name, has_past), strict=False):
            if name and not isinstance(dim, int):
                names.setdefault(str(dim), name)
    for value in values:
        if value.shape is not None:
            value.shape = type(value.shape)([_with_axis_names(dim, names) for dim in value.shape])


def _axis_names(name: str, has_past: bool) -> tuple[str, ...]:
    """Names of the dynamic axes of an input, "" where an axis has one length; `has_past` whether keys and values go in
    as well."""
    if name.startswith("past"):
        return "batch_size", "", "encoder_sequence_length" if ".encoder." in name else "past_sequence_length"
    if name == "attention_mask":
        return "batch_size", "total_sequence_length" if has_past else "sequence_length"
    return "batch_size", _LENGTHS.get(name, "")


def _with_axis_names(dim: Any, names: dict[str, str]) -> Any:
    if isinstance(dim, int) or dim.value is None:  # a length, or nothing known
        return dim
    return _SYMBOL.sub(lambda match: names.get(match[0], match[0]), str(dim))

"""From a program to a GGUF file."""

from pathlib import Path
from typing import Any

import torch

from ....dsl.syntax.diagnostics import Reject
from . import four_bits
from .families import sliding_window_metadata, supported_context_length
from .llama_rounding import Importance, add_rounded_tensors
from .number_types import FILE_TYPES
from .pretokenizers import resolve_doubt_with_llama
from .refusal import incompatible_type, refuse_beyond_float16
from .shapes import GgufShape, gguf_named_tensors, gguf_shape_of, shape_metadata
from .vocabulary import write_vocabulary_and_note_doubts

FILE = "model.gguf"
_BLOCK = 32  # weights that share a scale in q8_0


def write_gguf_and_notes(
    model: Any, folder: Path, file_type: str, tokenizer: Any, importance: Importance | None = None
) -> list[str]:
    """`model.gguf`, and sentences that a person should know of it.

    file_type   of matrices, one of `TYPES`; vectors are float32. With `q4_0` and `q4_1` matrices on no grid of four
           bits are `q8_0`; those of `FILE_TYPES` are rounded by llama.cpp, for the columns' `importance`
    """
    import gguf

    shape = gguf_shape_of(model)
    writer = gguf.GGUFWriter(folder / FILE, shape.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[file_type]))
    if file_type in FILE_TYPES:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in shape_metadata(model, shape).items():
        _add_key(writer, f"{shape.architecture}.{key}", value)
    notes = write_vocabulary_and_note_doubts(writer, tokenizer, model.config.vocab_size)
    notes += _add_tensors_and_notes(writer, model, shape, file_type, importance or {})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return resolve_doubt_with_llama(folder / FILE, tokenizer, notes) + _compatibility_notes(model.config, shape)


_FILE_TYPES = {
    "f32": "ALL_F32",
    **{kind: f"MOSTLY_{kind.upper()}" for kind in ("f16", "bf16", "q8_0", *four_bits.KINDS)},
    **FILE_TYPES,
}


def _add_tensors_and_notes(
    writer: Any, model: Any, shape: GgufShape, file_type: str, importance: Importance
) -> list[str]:
    tensors = gguf_named_tensors(model, shape)
    if file_type in FILE_TYPES:
        count, tied = len(model.state_dict()), model.config.tie_word_embeddings
        return [add_rounded_tensors(writer, tensors, count, file_type, tied, importance).note()]
    exact = [_add_tensor_with_codes_if_on_grid(writer, name, tensor, file_type) for name, tensor in tensors]
    if file_type in four_bits.KINDS and not any(exact):
        raise Reject(four_bits.no_matrix_on_grid_diagnostic(file_type))
    return []


def _add_key(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_uint32(key, value)


def _add_tensor_with_codes_if_on_grid(writer: Any, name: str, tensor: torch.Tensor, file_type: str) -> bool:
    """Write it; whether it kept codes that it had."""
    import gguf

    if file_type in four_bits.KINDS:
        codes = four_bits.block_codes_if_on_grid(tensor.detach().cpu(), name, file_type) if tensor.ndim == 2 else None
        if codes is not None:
            raw = four_bits.pack_blocks(codes, file_type).numpy()
            writer.add_tensor(name, raw, raw_dtype=getattr(gguf.GGMLQuantizationType, file_type.upper()))
            return True
        file_type = "q8_0"
    array = tensor.detach().float().contiguous().cpu().numpy()
    if array.ndim == 1 or file_type == "f32":
        writer.add_tensor(name, array)
        return False
    if file_type == "q8_0" and array.shape[-1] % _BLOCK:
        raise incompatible_type(
            f"{name} has rows of {array.shape[-1]}, and q8_0 takes multiples of {_BLOCK}",
            help="prune with `align: 32`, or write `type: f16`",
        ).rejection()
    if file_type == "f16":
        refuse_beyond_float16(name, array)
    quantised = getattr(gguf.GGMLQuantizationType, file_type.upper())
    writer.add_tensor(name, gguf.quants.quantize(array, quantised), raw_dtype=quantised)
    return False


def _compatibility_notes(config: Any, shape: GgufShape) -> list[str]:
    notes = []
    if shape.architecture == "deci":
        notes.append(
            "The GGUF file has the architecture `deci`, as llama.cpp calls Llamas whose layers differ; "
            "a layer without an MLP has one of zeros there, since llama.cpp would drop its attention."
        )
    length = supported_context_length(config)
    if length < config.max_position_embeddings:
        notes.append(
            f"The GGUF file states a context of {length} tokens, not {config.max_position_embeddings}: "
            f"the model attends in windows of that many, and llama.cpp's `{shape.architecture}` knows none."
        )
    if "attention.sliding_window_pattern" in sliding_window_metadata(config):
        notes.append(
            "The GGUF file says layer by layer which attend in windows. A llama.cpp too old for that would take them "
            f"as those of a whole `{shape.architecture}` lie, without a word."
        )
    return notes

"""generation_config.json, read for values that generation can have."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....dsl.syntax.diagnostics import Fault
from ...core.json_errors import describe_json_error
from ...core.safe_read import CONFIG, read_json

NAME = "generation_config.json"
_MAX_BEAMS, _MAX_VALUE = 64, 1 << 31
_HELP = "fetch the file again, or remove it: generation then begins from the usual values"

invalid_generation = Fault(
    "bad-generation-config",
    "A model's generation_config.json holds values that generation can't have.",
    exit="environment",
)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The values of a folder's file, {} where there is none; Reject (bad-generation-config) odd ones."""
    path = folder / NAME
    if not path.exists():
        return {}
    try:
        body = read_json(path, CONFIG)
    except (OSError, ValueError, RecursionError) as error:
        raise invalid_generation(
            f"{path} can't be read as JSON: {describe_json_error(error)}", help=_HELP
        ).rejection() from error
    if not isinstance(body, dict):
        raise invalid_generation(f"{path} is no JSON object", help=_HELP).rejection()
    for name, value in body.items():
        if not _is_valid_generation_value(name, value):
            raise invalid_generation(f"{path}: `{name[:60]}` is {str(value)[:60]!r}", help=_HELP).rejection()
    return body


def eos_ids_tuple(value: Any) -> tuple[int, ...] | None:
    """An eos setting as a tuple; None where none is set."""
    if value is None:
        return None
    return tuple(int(v) for v in (value if isinstance(value, (list, tuple)) else [value]))


def _is_valid_generation_value(name: str, value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, Mapping):  # what a library's version writes beside the values of generation
        return all(_is_scalar_or_list_of_scalars(item) for item in value.values())
    if name.endswith("token_id") or name.endswith("token_ids") or name.endswith("tokens"):
        return _is_id(value) or (
            isinstance(value, list)
            and len(value) < 10_000
            and all(_is_id(item) or (isinstance(item, list) and all(map(_is_id, item))) for item in value)
        )
    if name in ("num_beams", "num_return_sequences", "num_beam_groups", "num_assistant_tokens"):
        return type(value) is int and 0 < value <= _MAX_BEAMS
    if name in _TEXTS:
        return isinstance(value, str) and len(value) < 200
    if name in _LISTS:
        return isinstance(value, list) and len(value) < 10_000 and all(map(_is_scalar_or_list_of_scalars, value))
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < _MAX_VALUE


_TEXTS = ("transformers_version", "cache_implementation", "early_stopping", "_from_model_config", "task", "language")
_LISTS = tuple(
    """
    stop_strings bad_words_ids force_words_ids sequence_bias alignment_heads lang_to_id task_to_id
    forced_decoder_ids constraints
    """.split()
)


def _is_id(value: Any) -> bool:
    return type(value) is int and -1 <= value < _MAX_VALUE


def _is_scalar_or_list_of_scalars(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, (bool, int, float, str))
        or (isinstance(value, list) and all(isinstance(item, (int, float, str)) for item in value))
    )

"""A model folder as Hugging Face lays it out, opened without torch: config, tokenizer files, safetensors headers.

Nothing here unpickles, and nothing runs code that came with a model unless the command line granted it.
"""

import os
from collections.abc import Mapping
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from ....dsl.syntax.diagnostics import Fault
from ....dsl.syntax.source_file import irregular_kind_of_path
from ...core.cache import canonical_json_sha256
from ...core.json_errors import describe_json_error
from ...core.safe_read import CONFIG, TOKENIZER, read_json, refuse_irregular_file
from ...core.settings import Settings
from .config_bounds import invalid_config, refuse_excessive_config_numbers
from .config_classes import fallback_class_note
from .mamba_rescale import NOTE, rescales_residual_weights
from .origin import Origin
from .safetensors_header import FLOATS
from .source_files import SourceFiles, link_root_of
from .weights import Weights, missing_weights_hint, no_model, read_weight_headers

if TYPE_CHECKING:
    from torch import nn

remote_code = Fault(
    "remote-code",
    "A model needs code that came with it, and running that was not granted.\n\n"
    "`--trust-remote-code` on the command line grants it; a recipe can't.",
    exit="environment",
)
weights_dtype = Fault(
    "weights-dtype", "A checkpoint holds its weights as something other than plain floats.", exit="environment"
)

TOKENIZER_FILES = tuple(
    """
    tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json vocab.json vocab.txt
    merges.txt added_tokens.json chat_template.jinja chat_template.json spiece.model tekken.json
    tiktoken.model
    """.split()
)
# Beside the tokenizer: what a checkpoint folder has to say that weights and config don't.
COMPANIONS = (
    *TOKENIZER_FILES,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
# Slow types of a processor that has no arithmetic for them: measured 7.6 s in float16, 1.9 s in float32, 1.1 s
# in bfloat16 for 512 tokens of a 135M model on an AVX512 machine.
SLOW_FLOAT16 = (
    "float16 is kept as stored and computes several times slower than float32 on a CPU; "
    "`dtype: float32` or `dtype: bfloat16` changes that"
)


def origin_of_folder(folder: Path, label: str, dtype: str, settings: Settings, help: str = "") -> Origin:
    """The origin of a local folder. `dtype` "auto" keeps what the files hold."""
    if not os.path.isdir(folder):  # false of a name that is too long for the system, too
        message = f"{folder} is {irregular_kind_of_path(folder) or 'a file'}, where a folder is needed"
        message = message if os.path.exists(folder) else f"there is no folder {folder}"
        raise no_model(f"{label}: {message}", help=help).rejection()
    for name in ("config.json", *COMPANIONS):
        if (folder / name).exists():
            refuse_irregular_file(folder / name, TOKENIZER, link_root_of(folder))
    config = read_model_config(folder / "config.json", label)
    trusted = runs_remote_code_or_refuse(config, label, settings)
    weights = read_weight_headers(folder, label)
    stored_dtype = _stored_dtype_or_refuse(config, weights, label)
    refuse_adapter_folder(folder, label)
    if not trusted:
        refuse_excessive_config_numbers(config, weights.slots, label)
    chosen = stored_dtype if dtype == "auto" else dtype
    tokenizers = tokenizer_files_if_complete(folder)
    decides = {"config.json": folder / "config.json", **weights.files}
    files = SourceFiles(settings.cache_dir)
    return Origin(
        label=label,
        config=config,
        folder=folder,
        identity=canonical_json_sha256([files.hash_all(decides), chosen]),
        build=partial(
            _build_within_weight_count, config, chosen, folder if trusted else None, None if trusted else weights.count
        ),
        load=partial(_load, folder, config, chosen, label, weights, trusted),
        tokenizer=cache(partial(load_tokenizer, folder, label, trusted)) if tokenizers else no_tokenizer,
        dtype=chosen,
        tokenizer_identity=files.hash_all(tokenizers) if tokenizers else "",
        weight_bytes=weights.count * WIDTHS[chosen],
        code=files.hash_all(_python_files(folder)) if trusted else "",
        files=files,
        notes=_model_notes(config, chosen, settings.device, trusted),
    )


def _model_notes(config: Mapping[str, Any], dtype: str, device: str, trusted: bool) -> tuple[str, ...]:
    class_note = "" if trusted else fallback_class_note(config)
    notes = {
        SLOW_FLOAT16: dtype == "float16" and device == "cpu",
        NOTE: rescales_residual_weights(config),
        class_note: class_note != "",
    }
    return tuple(note for note, applies in notes.items() if applies)


WIDTHS = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


def no_tokenizer() -> None:
    """The tokenizer of a source that has none."""


def read_model_config(config_path: Path, label: str) -> dict[str, Any]:
    """config.json as it is, checked to be an object that says what the model is."""
    if not os.path.isfile(config_path):
        kind = irregular_kind_of_path(config_path)
        message = (
            f"{config_path} is {kind}, where a file is needed"
            if kind
            else f"there is no {config_path.name} in {config_path.parent}"
        )
        raise no_model(f"{label}: {message}", help=missing_weights_hint(config_path.parent)).rejection()
    try:
        config = read_json(config_path, CONFIG)
    except OSError as error:
        raise invalid_config(f"{config_path} can't be read: {error.strerror}").rejection() from error
    except (ValueError, RecursionError) as error:
        raise invalid_config(
            f"{config_path} is not JSON: {describe_json_error(error)}", help="fetch the file again"
        ).rejection() from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise invalid_config(f"{config_path} has no `model_type`", help="take the model's own config.json").rejection()
    if not isinstance(config.get("architectures", []), (list, NoneType)):
        raise invalid_config(
            f"`architectures` of {config_path} is no list of names",
            help='write it as ["BertForMaskedLM"], with the class that the weights are of',
        ).rejection()
    return config


def runs_remote_code_or_refuse(config: Mapping[str, Any], label: str, settings: Settings) -> bool:
    """Whether the model's own code is to run: never unless transformers lacks the architecture and it was granted."""
    if "auto_map" not in config or _has_transformers_package(config["model_type"]):
        return False
    if not settings.trust_remote_code:
        raise remote_code(
            f"{label}: `{config['model_type']}` runs code that came with the model",
            help="read that code, then add --trust-remote-code",
        ).rejection()
    return True


def _has_transformers_package(model_type: str) -> bool:
    spec = find_spec("transformers")
    assert spec and spec.submodule_search_locations, "transformers is not installed"
    name = model_type.replace("-", "_")
    return name.isidentifier() and (Path(spec.submodule_search_locations[0]) / "models" / name).is_dir()


def _stored_dtype_or_refuse(config: Mapping[str, Any], weights: Weights, label: str) -> str:
    method = config.get("quantization_config")
    if isinstance(method, dict):
        name = method.get("quant_method", "some method")
        raise weights_dtype(
            f"{label}: the weights are quantized ({name})", help="start from the model that this one was quantized from"
        ).rejection()
    if not weights.dtype:
        kinds = sorted({slot.dtype for slot in weights.slots.values()})
        raise weights_dtype(
            f"{label}: the weights are {', '.join(kinds) or 'none at all'}", help=f"effc reads {', '.join(FLOATS)}"
        ).rejection()
    for name, slot in weights.slots.items():
        if slot.dtype not in FLOATS and name.endswith((".weight", ".bias")):
            raise weights_dtype(
                f"{label}: `{name}` is {slot.dtype}, where a weight is {', '.join(FLOATS)}",
                help="fetch the weights again, or start from the model that these were quantized from",
            ).rejection()
    return "float32" if weights.dtype == "float64" else weights.dtype


def tokenizer_files_if_complete(folder: Path) -> dict[str, Path]:
    """Files that make the tokenizer; empty where no vocabulary is among them."""
    existing = {n: folder / n for n in TOKENIZER_FILES if (folder / n).exists()}
    for path in existing.values():
        refuse_irregular_file(path, TOKENIZER, link_root_of(folder))
    vocabularies = {
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
        "tekken.json",
        "tiktoken.model",
    }
    return existing if vocabularies & set(existing) else {}


def _python_files(folder: Path) -> dict[str, Path]:
    return {file.name: file for file in sorted(folder.glob("*.py"))}


def refuse_adapter_folder(folder: Path, label: str) -> None:
    """transformers would fetch the model that an adapter names in place of the folder's own."""
    if (folder / "adapter_config.json").exists():
        raise no_model(
            f"{label}: {folder} holds an adapter (adapter_config.json), not a model",
            help="merge it into its model and save that",
        ).rejection()


def _build_within_weight_count(
    config: dict[str, Any], dtype: str, code_folder: Path | None, weight_count: int | None
) -> "nn.Module":
    from .checkpoint import build_model_from_config, refuse_oversized_module

    module = build_model_from_config(config, dtype, code_folder)
    if weight_count is not None:
        refuse_oversized_module(module, weight_count)
    return module


def _load(folder: Path, config: dict[str, Any], dtype: str, label: str, weights: Weights, trusted: bool) -> "nn.Module":
    from .checkpoint import load_checked_model

    return load_checked_model(folder, config, dtype, label, weights, trusted)


def load_tokenizer(folder: Path, label: str, trusted: bool = False) -> Any:
    from .tokenizer import load_checked_tokenizer

    return load_checked_tokenizer(folder, label, trusted)

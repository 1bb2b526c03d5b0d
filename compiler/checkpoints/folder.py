"""A model folder as Hugging Face lays it out, opened without torch: config, tokenizer files, safetensors headers.

Nothing here unpickles, and nothing runs code that came with a model unless the command line granted it.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import Any

from ...dsl.diagnostics import Fault, Reject
from ...dsl.read import other_kind
from ..machine.settings import Settings
from ..report.broken import breakage
from ..store.cache import digest
from ..store.regular import CONFIG, MANIFEST, MISFIT, TOKENIZER, check_regular, read_json
from .bounds import bad_config, check_numbers
from .classes import class_taken
from .origin import Origin
from .rescaled import NOTE, rescales
from .safetensors_header import FLOATS, Header, damaged_weights, read_header
from .source_files import SourceFiles

no_model = Fault("no-model", "A model source points at something that holds no model.", exit="environment")
pickle_weights = Fault(
    "pickle-weights",
    "A model has its weights only as a pickle, which runs code when it is read.\n\n"
    "effc reads safetensors and GGUF. Take a revision of the model with safetensors, or convert the file once, "
    "in a place of its own, if you trust its author.",
    exit="environment",
)
missing_shard = Fault(
    "missing-shard", "The index of a sharded checkpoint names files that are not there.", exit="environment"
)
remote_code = Fault(
    "remote-code",
    "A model needs code that came with it, and running that was not granted.\n\n"
    "`--trust-remote-code` on the command line grants it; a recipe can't.",
    exit="environment",
)
weights_dtype = Fault(
    "weights-dtype", "A checkpoint holds its weights as something other than plain floats.", exit="environment"
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
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
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Slow types of a processor that has no arithmetic for them: measured 7.6 s in float16, 1.9 s in float32, 1.1 s
# in bfloat16 for 512 tokens of a 135M model on an AVX512 machine.
SLOW_FLOAT16 = (
    "float16 is kept as stored and computes several times slower than float32 on a CPU; "
    "`dtype: float32` or `dtype: bfloat16` changes that"
)


@dataclass(frozen=True)
class Weights:
    """The safetensors files of a folder and their headers, by file name."""

    files: Mapping[str, Path]
    headers: Mapping[str, Header]

    @property
    def slots(self):
        return {name: slot for header in self.headers.values() for name, slot in header.slots.items()}

    @property
    def bytes(self) -> int:
        return sum(slot.end - slot.start for slot in self.slots.values())

    @property
    def dtype(self) -> str:
        """The float type that most bytes are in."""
        count: Counter[str] = Counter()
        for slot in self.slots.values():
            count[slot.dtype] += slot.end - slot.start
        return FLOATS.get(count.most_common(1)[0][0], "") if count else ""


def open_folder(folder: Path, label: str, dtype: str, settings: Settings, help: str = "") -> Origin:
    """The origin of a local folder. `dtype` "auto" keeps what the files hold."""
    if not os.path.isdir(folder):  # false of a name that is too long for the system, too
        said = f"{folder} is {other_kind(folder) or 'a file'}, where a folder is needed"
        said = said if os.path.exists(folder) else f"there is no folder {folder}"
        raise Reject(no_model(f"{label}: {said}", help=help))
    for name in ("config.json", *COMPANIONS):
        if (folder / name).exists():
            check_regular(folder / name, TOKENIZER, root_of(folder))
    config = read_config(folder / "config.json", label)
    trusted = check_code(config, label, settings)
    weights = find_weights(folder, label)
    found = _check_dtype(config, weights, label)
    refuse_adapter(folder, label)
    if not trusted:
        check_numbers(config, weights.slots, label)
    chosen, count = found if dtype == "auto" else dtype, sum(s.count for s in weights.slots.values())
    tokenizers = tokenizer_files(folder)
    decides = {"config.json": folder / "config.json", **weights.files}
    files = SourceFiles(settings.cache_dir)
    return Origin(
        label=label,
        config=config,
        folder=folder,
        identity=digest([files.hash_all(decides), chosen]),
        build=partial(_build, config, chosen, folder if trusted else None, None if trusted else count),
        load=partial(_load, folder, config, chosen, label, None if trusted else count),
        tokenizer=cache(partial(load_tokenizer, folder, label, trusted)) if tokenizers else nothing,
        dtype=chosen,
        tokenizer_identity=files.hash_all(tokenizers) if tokenizers else "",
        weight_bytes=count * WIDTHS[chosen],
        code=files.hash_all(_code(folder)) if trusted else "",
        files=files,
        notes=_notes(config, chosen, settings.device, trusted),
    )


def _notes(config: Mapping[str, Any], dtype: str, device: str, trusted: bool) -> tuple[str, ...]:
    taken = "" if trusted else class_taken(config)
    said = {SLOW_FLOAT16: dtype == "float16" and device == "cpu", NOTE: rescales(config), taken: taken != ""}
    return tuple(note for note, holds in said.items() if holds)


WIDTHS = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


def nothing() -> None:
    """The tokenizer of a source that has none."""


def read_config(path: Path, label: str) -> dict[str, Any]:
    """config.json as it is, checked to be an object that says what the model is."""
    if not os.path.isfile(path):
        kind = other_kind(path)
        said = f"{path} is {kind}, where a file is needed" if kind else f"there is no {path.name} in {path.parent}"
        raise Reject(no_model(f"{label}: {said}", help=_what_lies_there(path.parent)))
    try:
        config = read_json(path, CONFIG)
    except OSError as error:
        raise Reject(bad_config(f"{path} can't be read: {error.strerror}")) from error
    except (ValueError, RecursionError) as error:
        raise Reject(bad_config(f"{path} is not JSON: {breakage(error)}", help="fetch the file again")) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise Reject(bad_config(f"{path} has no `model_type`", help="take the model's own config.json"))
    if not isinstance(config.get("architectures", []), (list, NoneType)):
        raise Reject(
            bad_config(
                f"`architectures` of {path} is no list of names",
                help='write it as ["BertForMaskedLM"], with the class that the weights are of',
            )
        )
    return config


def _what_lies_there(folder: Path) -> str:
    if not os.path.isdir(folder):
        return "take a folder that `save_pretrained` wrote"
    if any(folder.glob("*.gguf")):
        return f'a GGUF file is read with gguf("{next(folder.glob("*.gguf")).name}")'
    inner = next(folder.glob("*/config.json"), None)
    return f"one lies in {inner.parent}" if inner else "take a folder that `save_pretrained` wrote"


def check_code(config: Mapping[str, Any], label: str, settings: Settings) -> bool:
    """Whether the model's own code is to run: never unless transformers lacks the architecture and it was granted."""
    if "auto_map" not in config or _is_native(config["model_type"]):
        return False
    if not settings.trust_remote_code:
        raise Reject(
            remote_code(
                f"{label}: `{config['model_type']}` runs code that came with the model",
                help="read that code, then add --trust-remote-code",
            )
        )
    return True


def _is_native(model_type: str) -> bool:
    spec = find_spec("transformers")
    assert spec and spec.submodule_search_locations, "transformers is not installed"
    name = model_type.replace("-", "_")
    return name.isidentifier() and (Path(spec.submodule_search_locations[0]) / "models" / name).is_dir()


def find_weights(folder: Path, label: str) -> Weights:
    """Headers of the safetensors files, or `Reject` saying what lies there instead."""
    if (folder / INDEX).is_file():
        return _sharded(folder, label)
    if (folder / SINGLE).is_file():
        return Weights({SINGLE: folder / SINGLE}, {SINGLE: read_header(folder / SINGLE)})
    pickles = sorted(f.name for pattern in PICKLES for f in folder.glob(pattern))
    if pickles:
        raise Reject(
            pickle_weights(
                f"{label}: the weights are only there as {', '.join(pickles[:3])}",
                help="take a revision with model.safetensors, or load the model once with "
                "transformers where you trust it and `save_pretrained` it",
            )
        )
    if shards := sorted(f.name for f in folder.glob("model-*-of-*.safetensors")):
        raise Reject(
            no_model(f"{label}: {folder} has {len(shards)} shards and no {INDEX}", help="fetch the index of the shards")
        )
    raise Reject(
        no_model(
            f"{label}: there is no {SINGLE} in {folder}",
            help=_what_lies_there(folder)
            if any(folder.glob("*.gguf"))
            else 'fetch the weights; config.json alone is read with config("config.json"), which makes random ones',
        )
    )


def _sharded(folder: Path, label: str) -> Weights:
    index = folder / INDEX
    try:
        read = read_json(index, MANIFEST)
    except MISFIT as error:
        raise Reject(
            damaged_weights(f"{index} is no index of shards", help="fetch it again", note=breakage(error))
        ) from error
    places = read.get("weight_map") if isinstance(read, dict) else None
    if not isinstance(places, dict):
        said = "its `weight_map`, which says which file a tensor is in, is no object"
        raise Reject(damaged_weights(f"{index} is no index of shards: {said}", help="fetch it again"))
    for tensor, file in places.items():
        if not isinstance(file, str):
            raise Reject(damaged_weights(f"{index} names no file for `{tensor}`", help="fetch it again"))
    names = sorted(set(places.values()))
    if not all(n and Path(n).name == n for n in names):
        raise Reject(damaged_weights(f"{index} names files outside its folder", help="fetch it again"))
    gone = [n for n in names if not (folder / n).is_file()]
    if gone:
        raise Reject(
            missing_shard(
                f"{label}: {len(gone)} of {len(names)} shards are not there: {', '.join(gone[:3])}",
                help=f"fetch them into {folder}",
            )
        )
    headers = {n: read_header(folder / n) for n in names}
    lost = [t for t, n in places.items() if t not in headers[n].slots]
    if lost:
        raise Reject(
            missing_shard(
                f"{label}: `{lost[0]}` is not in {places[lost[0]]}, where the index puts it",
                help="fetch the index and the shards of one revision",
            )
        )
    first: dict[str, str] = {}
    for name in names:
        for tensor in headers[name].slots:
            if tensor in first:
                raise Reject(
                    damaged_weights(
                        f"{label}: `{tensor}` is in {first[tensor]} and again in {name}",
                        help="fetch the index and the shards of one revision",
                    )
                )
            first[tensor] = name
    return Weights({INDEX: index, **{n: folder / n for n in names}}, headers)


def _check_dtype(config: Mapping[str, Any], weights: Weights, label: str) -> str:
    method = config.get("quantization_config")
    if isinstance(method, dict):
        name = method.get("quant_method", "some method")
        raise Reject(
            weights_dtype(
                f"{label}: the weights are quantized ({name})",
                help="start from the model that this one was quantized from",
            )
        )
    if not weights.dtype:
        kinds = sorted({slot.dtype for slot in weights.slots.values()})
        raise Reject(
            weights_dtype(
                f"{label}: the weights are {', '.join(kinds) or 'none at all'}", help=f"effc reads {', '.join(FLOATS)}"
            )
        )
    for name, slot in weights.slots.items():
        if slot.dtype not in FLOATS and name.endswith((".weight", ".bias")):
            raise Reject(
                weights_dtype(
                    f"{label}: `{name}` is {slot.dtype}, where a weight is {', '.join(FLOATS)}",
                    help="fetch the weights again, or start from the model that these were quantized from",
                )
            )
    return "float32" if weights.dtype == "float64" else weights.dtype


def root_of(folder: Path) -> Path:
    """What links of a model folder may not lead out of: the folder, or the hub's cache of that model."""
    cached = folder.parent.name == "snapshots" and (folder.parents[1] / "blobs").is_dir()
    return folder.parents[1] if cached else folder


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Files that make the tokenizer; empty where no vocabulary is among them."""
    found = {n: folder / n for n in TOKENIZER_FILES if (folder / n).exists()}
    for path in found.values():
        check_regular(path, TOKENIZER, root_of(folder))
    vocabularies = {
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
        "tekken.json",
        "tiktoken.model",
    }
    return found if vocabularies & set(found) else {}


def _code(folder: Path) -> dict[str, Path]:
    return {file.name: file for file in sorted(folder.glob("*.py"))}


def refuse_adapter(folder: Path, label: str) -> None:
    """transformers would fetch the model that an adapter names in place of the folder's own."""
    if (folder / "adapter_config.json").exists():
        raise Reject(
            no_model(
                f"{label}: {folder} holds an adapter (adapter_config.json), not a model",
                help="merge it into its model and save that",
            )
        )


def _build(config: dict[str, Any], dtype: str, code: Path | None, count: int | None):
    from .checkpoint import build, check_size

    module = build(config, dtype, code)
    if count is not None:
        check_size(module, count)
    return module


def _load(folder: Path, config: dict[str, Any], dtype: str, label: str, count: int | None):
    from .checkpoint import load

    return load(folder, config, dtype, label, count)


def load_tokenizer(folder: Path, label: str, trusted: bool = False):
    from .tokenizer import open_tokenizer

    return open_tokenizer(folder, label, trusted)

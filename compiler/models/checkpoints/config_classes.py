"""Classes of transformers that a config may name, and the keys of a config that are dropped.

A config comes from anybody. `architectures` names one of transformers' own classes for the config's model
type; keys that name code, kernels, other files or a method of quantisation are left out, and what a model computes
with is effc's choice.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DROPPED_KEYS = frozenset(
    """
    auto_map custom_pipelines quantization_config _attn_implementation attn_implementation
    _attn_implementation_internal _attn_implementation_autoset _experts_implementation
    experts_implementation _experts_implementation_internal use_kernels kernel_config
    transformers_weights _commit_hash name_or_path _name_or_path adapter_kwargs _adapter_model_path
    compression_config base_model_tp_plan base_model_pp_plan distributed_config device_map tp_plan
    subfolder code_revision trust_remote_code
    """.split()
)


def drop_unsafe_config_keys(value: Any) -> Any:
    """A config without keys that lead to code, kernels or files; infinity as a number, as transformers spells it."""
    if isinstance(value, list):
        return [drop_unsafe_config_keys(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"__float__"}:
        return float(value["__float__"])
    return {key: drop_unsafe_config_keys(item) for key, item in value.items() if key not in _DROPPED_KEYS}


def model_class_names(model_type: str) -> Iterator[str]:
    """Names of the model classes that transformers has for a model type, whatever the task."""
    from transformers.models.auto import modeling_auto

    for name, table in vars(modeling_auto).items():
        if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES") and isinstance(table, Mapping):
            known = table.get(model_type, ())
            yield from (known,) if isinstance(known, str) else known


@cache
def _cached_model_class_names(model_type: str) -> frozenset[str]:
    return frozenset(model_class_names(model_type))


@cache
def names_exported_by_transformers() -> frozenset[str]:
    """All names that transformers gives; to ask for them takes a tenth of a second."""
    import transformers

    return frozenset(dir(transformers))


def model_class_from_architectures(model_type: str, architectures: Any) -> "type[PreTrainedModel] | None":
    """The first class of `architectures` that transformers has for the model type.

    Either its tables list it there, or it is one of its own, with a config of that type: `PatchTSTForPrediction` and
    `LongT5EncoderModel` stand in no table.
    """
    import transformers
    from transformers import PreTrainedModel

    listed = _cached_model_class_names(model_type)
    for name in architectures if isinstance(architectures, (list, tuple)) else ():
        known = isinstance(name, str) and (name in listed or name in names_exported_by_transformers())
        kind = getattr(transformers, name, None) if known else None
        if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
            continue
        runs = kind.forward is not PreTrainedModel.forward
        if name in listed or (runs and getattr(kind.config_class, "model_type", None) == model_type):
            return kind
    return None


def fallback_class_note(config: Mapping[str, Any]) -> str:
    """Note for the user where a config names no class that transformers has, and another is taken; else "".

    Modeling files are looked into first: torch, which the tables of classes need, is slow to import.
    """
    model_type, named = config["model_type"], config.get("architectures") or []
    names = [name for name in named if isinstance(name, str)]
    if any(f"\nclass {name}(" in text for text in _modeling_sources(model_type) for name in names):
        return ""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    class_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    known = not names_exported_by_transformers().isdisjoint(names)
    if class_name is None or known or model_class_from_architectures(model_type, names) is not None:
        return ""  # it opens as that class, or is refused once it is made
    if not named:
        return f"`architectures` of the config names no class: opened as {class_name}"
    names_text = ", ".join(map(str, named))[:80]
    return f"`architectures` of the config names {names_text}, which transformers doesn't have: opened as {class_name}"


def _modeling_sources(model_type: str) -> Iterator[str]:
    spec = find_spec("transformers")
    name = model_type.replace("-", "_")
    if spec and spec.submodule_search_locations and name.isidentifier():
        for path in Path(spec.submodule_search_locations[0], "models", name).glob("modeling_*.py"):
            yield path.read_text(encoding="utf-8")


_GENERIC = frozenset(
    {
        "PreTrainedTokenizer",
        "PreTrainedTokenizerFast",
        "TokenizersBackend",
        "SentencePieceBackend",
        "PythonBackend",
        "MistralCommonBackend",
    }
)


def is_known_tokenizer_class(name: Any) -> bool:
    """Whether a tokenizer's files may name a class: one of transformers' own table of tokenizers."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    known = set()
    for classes in TOKENIZER_MAPPING_NAMES.values():
        known |= {classes} if isinstance(classes, str) else set(filter(None, classes or ()))
    spellings = {name, name.removesuffix("Fast"), f"{name}Fast"} if isinstance(name, str) else set()
    return not spellings.isdisjoint(known | _GENERIC)

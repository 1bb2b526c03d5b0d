"""Modules from configs and checkpoints: the side of model sources that needs torch.

transformers reads the weights (it knows renamed and fused tensors of every architecture); effc makes it quiet,
strict and safe: no pickle, no download, no silent re-initialisation, no value that is not finite.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from ....dsl.syntax.diagnostics import Fault, Reject
from ...core.events import iterate_and_report
from ...core.json_errors import first_line
from ...core.quantity import count_text
from .config_bounds import invalid_config
from .config_classes import drop_unsafe_config_keys, model_class_from_architectures, names_exported_by_transformers
from .generation_config import NAME as GENERATION
from .generation_config import read_generation_config
from .mamba_rescale import disable_rescaling
from .pack_quantized import max_unpacked_count, read_dense_tensors, refuse_excess_packed_numbers
from .weights import Weights

other_weights = Fault(
    "other-weights",
    "The tensors of a checkpoint are not those that its config asks for.\n\n"
    "Names or shapes differ: config.json and the weights come from different models or revisions.",
    exit="environment",
)
not_finite = Fault(
    "not-finite",
    "A checkpoint holds NaN or infinite weights.\n\n"
    "Training diverged, or the values overflowed when they were cast to float16.",
    exit="environment",
)
unknown_architecture = Fault(
    "unknown-architecture", "transformers does not know a model's architecture.", exit="environment"
)
model_code = Fault(
    "model-code",
    "The code that came with a model does not make it.\n\n"
    "It may need a package that is not here, often one for CUDA alone, or another version of transformers.",
    exit="environment",
)

# Tensors that stock checkpoints carry and modules make for themselves.
SLACK = 1 << 24  # numbers that a model may have beside its weights: tables of positions, ties
HARMLESS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", "position_ids")


def build_model_from_config(config: Mapping[str, Any], dtype: str, code: Path | None = None) -> nn.Module:
    """The module of a config, initialised at random; under `torch.device("meta")` without storage.

    `code` is the folder whose own modeling code may run; None: transformers' classes only.
    """
    if code is not None:
        with without_library_logs(), remote_code_errors_as_diagnostics(code):
            parsed = transformers.AutoConfig.from_pretrained(code, trust_remote_code=True)
            module = transformers.AutoModelForCausalLM.from_config(
                parsed, dtype=getattr(torch, dtype), trust_remote_code=True
            )
        return module.eval()
    parsed, kind = config_and_model_class(config)
    with without_library_logs(), transformers_errors_as_invalid_config(f"a `{config['model_type']}`"):
        module = kind._from_config(
            parsed, dtype=getattr(torch, dtype), attn_implementation=attn_implementation_of_class(kind, parsed)
        )
    return module.eval()


@contextmanager
def transformers_errors_as_invalid_config(label: str) -> Iterator[None]:
    """Turn whatever transformers raises while it makes a model into Reject (bad-config): anyone wrote the config."""
    try:
        yield
    except (Reject, MemoryError):
        raise
    except Exception as error:
        lacks = isinstance(error, ImportError)
        raise invalid_config(
            f"transformers makes no model of the config of {label}",
            note=first_line(error),
            help="install what it asks for" if lacks else "take the model's own config.json; --debug shows where",
        ).rejection() from error


def refuse_oversized_module(module: nn.Module, weight_count: int, size_factor: int = 1) -> None:
    """Reject (other-weights) where a module asks for far more numbers than the weights have.

    Names and shapes are compared when weights are read; this comes before room is made for them.
    """
    n_params = sum(p.numel() for p in module.parameters())
    n_buffers = sum(b.numel() for b in module.buffers())
    if n_params > size_factor * (2 * weight_count + SLACK) or n_buffers > size_factor * (2 * weight_count + 16 * SLACK):
        raise other_weights(
            f"the config asks for {count_text(max(n_params, n_buffers), 'number')}, and the weights have "
            f"{count_text(weight_count, 'number')}",
            help="take config.json from the same revision",
        ).rejection()


@contextmanager
def remote_code_errors_as_diagnostics(folder: Path) -> Iterator[None]:
    """Turn whatever a model's own code raises into Reject (model-code)."""
    try:
        yield
    except Exception as error:  # anyone wrote it
        lacks = isinstance(error, ImportError)
        raise model_code(
            f"the code in {folder.name} raises {type(error).__name__}",
            note=first_line(error),
            help="install what it asks for; if that runs on CUDA alone, take a model that transformers itself knows"
            if lacks
            else "--debug shows where",
        ).rejection() from error


def config_and_model_class(
    config: Mapping[str, Any],
) -> "tuple[transformers.PreTrainedConfig, type[transformers.PreTrainedModel]]":
    """The config object and the model class; causal language models where `architectures` is silent."""
    from ....dsl.syntax.nearest import nearest_name

    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    model_type = config["model_type"]
    if model_type not in known:
        closest = nearest_name(model_type, list(known))
        raise unknown_architecture(
            f"transformers {transformers.__version__} does not know the model type `{model_type}`",
            help=f"nearest is `{closest}`" if closest else "a newer transformers may know it",
        ).rejection()
    try:
        with without_library_logs():
            parsed = known[model_type].from_dict(drop_unsafe_config_keys(dict(config)))
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        ImportError,
        StrictDataclassError,
    ) as error:
        raise invalid_config(
            f"the config has values that a `{model_type}` can't have", note=first_line(error)
        ).rejection() from error
    _refuse_timm_backbone(parsed)
    names = config.get("architectures") or ()
    kind = model_class_from_architectures(model_type, names)
    if kind is None:
        classes = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
        if type(parsed) not in classes or (
            isinstance(names, (list, tuple))
            and not names_exported_by_transformers().isdisjoint(name for name in names if isinstance(name, str))
        ):
            raise _unknown_class_rejection(model_type, names)
        listed = classes[type(parsed)]
        assert isinstance(listed, type), f"several classes for a {type(parsed).__name__}"
        kind = listed
    return parsed, kind


def _unknown_class_rejection(model_type: str, names: Any) -> Reject:
    """Why none of the names is taken: nobody's class, or that of another model type."""
    named = names if isinstance(names, (list, tuple)) else [names]
    message = f"{', '.join(map(str, named)) or model_type} is no model class of transformers {transformers.__version__}"
    for name in named:
        kind = (
            getattr(transformers, name, None)
            if isinstance(name, str) and name in names_exported_by_transformers()
            else None
        )
        owner = getattr(getattr(kind, "config_class", None), "model_type", model_type)
        if owner and owner != model_type:
            message = (
                f"{name} is no model class of transformers {transformers.__version__} for a `{model_type}`, which the "
                f"config is of: it is one of `{owner}`"
            )
            break
    return unknown_architecture(message, help="name one in `architectures` of config.json").rejection()


def _refuse_timm_backbone(config: "transformers.PreTrainedConfig") -> None:
    if any("timm" in part.model_type for part in _config_and_sub_configs(config)):
        raise unknown_architecture(
            f"a part of `{config.model_type}` comes from timm, which takes code and weights from anywhere",
            help="give it a backbone of transformers, or wrap it in a module of your own: `effc explain module`",
        ).rejection()


def _config_and_sub_configs(config: "transformers.PreTrainedConfig") -> "Iterator[transformers.PreTrainedConfig]":
    """A config and those of its parts, those that it has by default included."""
    yield config
    for part in vars(config).values():
        if isinstance(part, transformers.PreTrainedConfig):
            yield from _config_and_sub_configs(part)


def attn_implementation_of_class(
    model_class: "type[transformers.PreTrainedModel]", config: "transformers.PreTrainedConfig"
) -> str | dict[str, Any]:
    """Attention of a class, as `attn_implementation`: torch's fused one wherever it is supported.

    Parts that a config names are models of their own: DETR has it, and its ResNet does not.
    """
    return _attn_by_sub_config("sdpa", config) if model_class._supports_sdpa else "eager"


def _attn_by_sub_config(implementation: str, config: "transformers.PreTrainedConfig") -> str | dict[str, Any]:
    sub_configs = {name: getattr(config, name, None) for name in config.sub_configs}
    parts = {
        name: _attn_by_sub_config(_sdpa_or_eager_of_config(part), part)
        for name, part in sub_configs.items()
        if part is not None
    }
    return (
        {"": implementation, **parts}
        if any(part_implementation != implementation for part_implementation in parts.values())
        else implementation
    )


def _sdpa_or_eager_of_config(config: "transformers.PreTrainedConfig") -> str:
    auto = transformers.models.auto.modeling_auto
    classes: list[type[transformers.PreTrainedModel]] = []
    for table in (auto.MODEL_MAPPING, auto.MODEL_FOR_BACKBONE_MAPPING):
        listed: Any = table.get(type(config), ())
        classes += listed if isinstance(listed, tuple) else [listed]
    return "sdpa" if all(kind._supports_sdpa for kind in classes) else "eager"


def load_checked_model(
    folder: Path, config: Mapping[str, Any], dtype: str, label: str, weights: Weights, trusted: bool = False
) -> nn.Module:
    """The module with its weights, mapped from disk where the dtype is the stored one; one copy otherwise.

    trusted   the folder's own code makes the model
    """
    module, info = _load_model_and_loading_info(folder, config, dtype, weights, trusted)
    refuse_mismatched_weights(info, label)
    refuse_non_finite_parameters(module, label)
    return module.eval()


def _load_model_and_loading_info(
    folder: Path, config: Mapping[str, Any], dtype: str, weights: Weights, trusted: bool
) -> Any:
    options = {"dtype": getattr(torch, dtype), "output_loading_info": True, "ignore_mismatched_sizes": True}
    if trusted:
        with without_library_logs(), remote_code_errors_as_diagnostics(folder):
            with torch.device("meta"):
                empty: Any = build_model_from_config(config, dtype, folder)
            n_params = sum(p.numel() for p in empty.parameters())
            refuse_excess_packed_numbers(config, weights, n_params, str(folder))
            tensors = read_dense_tensors(config, weights, str(folder))
            return from_pretrained_with_weights(type(empty), empty.config, folder, tensors, **options)
    return load_by_from_pretrained(folder, config, weights, **options)


def load_by_from_pretrained(folder: Path, config: Mapping[str, Any], weights: Weights, **options: Any) -> Any:
    """Model by `from_pretrained` of the class that a config names, after a check that the weights fit in memory."""
    read_generation_config(folder)
    with torch.device("meta"):
        empty = build_model_from_config(config, "float32")
        refuse_oversized_module(empty, max_unpacked_count(config, weights, str(folder)))
    refuse_excess_packed_numbers(config, weights, sum(p.numel() for p in empty.parameters()), str(folder))
    parsed, kind = config_and_model_class(config)
    disable_rescaling(parsed)
    tensors = read_dense_tensors(config, weights, str(folder))
    with without_library_logs(), transformers_errors_as_invalid_config(str(folder)):
        return from_pretrained_with_weights(
            kind, parsed, folder, tensors, attn_implementation=attn_implementation_of_class(kind, parsed), **options
        )


def from_pretrained_with_weights(
    model_class: Any, config: "transformers.PreTrainedConfig", folder: Path, tensors: dict[str, torch.Tensor], **options
) -> Any:
    """A model of a class as `from_pretrained` gives it, and what `options` add, from these tensors alone.

    Left to itself transformers takes the first that it finds of an adapter, shards of a distributed checkpoint, a file
    that the config names, one file, an index, and what the class lists beside them.
    """
    extra = getattr(type(config), "extra_files", ())
    if extra:
        raise other_weights(
            f"{folder}: a `{config.model_type}` has weights in {', '.join(extra)} as well, which effc does not read",
            help="take a model whose weights lie in model.safetensors, or in shards that an index names",
        ).rejection()
    # From 5.25 on transformers fetches kernels from the hub, and runs them unless `use_kernels` says no.
    read = model_class.from_pretrained(None, config=config, state_dict=tensors, use_kernels=False, **options)
    model = read[0] if isinstance(read, tuple) else read
    if model.can_generate():
        has_generation = (folder / GENERATION).is_file()
        model.generation_config = transformers.GenerationConfig.from_pretrained(
            folder, GENERATION if has_generation else "config.json", _from_model_config=not has_generation
        )
    model.name_or_path = model.config.name_or_path = str(folder)
    return read


def refuse_mismatched_weights(info: Mapping[str, Any], label: str) -> None:
    """Reject shapes, names and weights that `from_pretrained` would have papered over, one diagnostic each kind."""
    faults = []
    shapes = sorted((name, tuple(stored), tuple(expected)) for name, stored, expected in info["mismatched_keys"])
    if shapes:
        name, stored, expected = shapes[0]
        faults.append(
            other_weights(
                f"{label}: `{name}` is {_shape_text(stored)} in the weights and {_shape_text(expected)} by "
                f"the config{_extra_keys_text(shapes)}",
                help="take config.json from the same revision",
            )
        )
    missing = sorted(info["missing_keys"])
    if missing:
        faults.append(
            other_weights(
                f"{label}: the weights have no `{missing[0]}`{_extra_keys_text(missing)}",
                help="fetch the weights again, or take the config they were saved with",
            )
        )
    extra = sorted(n for n in info["unexpected_keys"] if not n.endswith(HARMLESS))
    if extra:
        faults.append(
            other_weights(
                f"{label}: the config has no place for `{extra[0]}`{_extra_keys_text(extra)}",
                help="take config.json from the same revision",
            )
        )
    if faults:
        raise Reject(*faults)


def _shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _extra_keys_text(items: list) -> str:
    return f", and {len(items) - 1} more" if len(items) > 1 else ""


@torch.no_grad()
def refuse_non_finite_parameters(module: nn.Module, label: str) -> None:
    """Reject NaN or infinite weights; one pass without a temporary: the extremes of a tensor show them."""
    broken = [
        name
        for name, p in iterate_and_report(module.named_parameters(), "weights read", len(list(module.parameters())))
        if p.is_floating_point() and p.numel() and not all(e.isfinite() for e in p.aminmax())
    ]
    if broken:
        count = int((~module.get_parameter(broken[0]).isfinite()).sum())
        raise not_finite(
            f"{label}: `{broken[0]}` holds {count_text(count, 'value')} NaN or infinite{_extra_keys_text(broken)}",
            help="take another revision, or one stored in float32 or bfloat16",
        ).rejection()


def model_with_random_weights(config: Mapping[str, Any], seed: int, dtype: str) -> nn.Module:
    """The module of a config with the weights that a seed decides; leaves torch's own generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model_from_config(config, dtype)


_LOGGERS = ("huggingface_hub", "datasets", "lm_eval", "accelerate", "httpx")


@contextmanager
def without_library_logs() -> Iterator[None]:
    """Inside, libraries show no progress bars and log lines: effc tells what happens by its own events."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    if level == log.CRITICAL and not bars:  # inside of another: each change of a level empties every logger's cache
        yield
        return
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in _LOGGERS}
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
        for logger, known in levels.items():
            logger.setLevel(known)

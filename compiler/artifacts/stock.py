"""Whether a changed model is one that transformers itself can build, and from which config.

Decided by building it: the stock class is made without weights from the config, and its modules, tensors and
plain attributes are compared with ours. Where only sizes differ, config values that would explain them are
tried: first what modules say of themselves, then numbers that occur in the shapes.
"""

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from ..ir.layers.fast_mixers import runs_on_kernels
from ..ir.layers.linear import kernel_linears
from ..models.checkpoints.pretrained import pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WIDTHS = re.compile(r"inner|intermediate|ffn|head|state|expand|experts|width|dim|size|d_model|embd")
_FIXED = re.compile(r"layers?$|_layer$|vocab|token|position|max_|window|version|seed")
_LONGEST_SEARCH = 24
_REFUSALS = (
    ValueError,
    TypeError,
    RuntimeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    StrictDataclassError,
)


class StockConfig(NamedTuple):
    config: Any
    differences: list[str]


def stock_config(model: nn.Module) -> StockConfig:
    """A config from which transformers builds this very model; and why none does, empty where one does."""
    from ..models.checkpoints.checkpoint import without_library_logs

    with without_library_logs():  # dozens are built
        return _infer_stock_config(model)


def _infer_stock_config(model: nn.Module) -> StockConfig:
    bound = [
        path for path, module in model.named_modules() if "forward" in vars(module) and not runs_on_kernels(module)
    ]
    if bound:
        return StockConfig(model.config, [f"{path} runs another graph than its class" for path in bound])
    packed = [f"{path} is a KernelLinear, which transformers doesn't have" for path, _ in kernel_linears(model)]
    if packed:
        return StockConfig(model.config, packed)
    config = copy.deepcopy(model.config)
    before = empty_model_or_reason(type(pretrained(model)), config, model.dtype)
    if isinstance(before, str):
        return StockConfig(config, [before])
    uneven = list(_uneven_layer_shape_reasons(model, before))
    if uneven:
        return StockConfig(config, uneven)
    untouched = {path: module_numbers(module, None) for path, module in before.named_modules()}
    differing = stock_differences(model, config, untouched)
    agreed = _agreed_config_values(model, config)
    changes: Any = agreed
    while differing and changes is not None:
        candidate = _config_with_changes(config, changes)
        left = stock_differences(model, candidate, untouched)
        if len(left) < len(differing):
            config, differing, agreed = candidate, left, {}
        elif changes and changes is not agreed:
            break
        changes = _best_explaining_change(model, config, untouched, differing, agreed) if differing else None
    return StockConfig(config, differing)


def _best_explaining_change(
    model: nn.Module, config: Any, original_numbers: Any, differing: list[str], agreed_values: dict[str, Any]
) -> dict[str, Any] | None:
    """The change of one value that explains most, or of two by the same share, where one alone makes no model:
    heads and the width that they fill. None where none explains anything.

    agreed_values  what the modules say, if that alone explains nothing
    """
    guesses = list(_candidate_config_changes(model, config))
    for changes in (
        guesses,
        [agreed_values | guess for guess in guesses] if agreed_values else [],
        list(_pairs_of_equal_ratio(config, guesses)),
    ):
        rated = [
            (len(stock_differences(model, _config_with_changes(config, c), original_numbers)), i, c)
            for i, c in enumerate(changes)
        ]
        best = min(rated, default=None)
        if best and best[0] < len(differing):
            return best[2]
    return None


def _pairs_of_equal_ratio(config: Any, config_changes: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Changes of two values of the config that scale both by one ratio."""
    scaled = [
        (name, value, value / getattr(config, name))
        for guess in config_changes
        for name, value in guess.items()
        if len(guess) == 1 and getattr(config, name)
    ]
    yield from (
        {name: value, other: other_value}
        for i, (name, value, ratio) in enumerate(scaled)
        for other, other_value, other_ratio in scaled[i + 1 :]
        if ratio == other_ratio and name != other
    )


def _config_with_changes(config: Any, changes: Mapping[str, Any]) -> Any:
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def _uneven_layer_shape_reasons(model: nn.Module, original: nn.Module) -> Iterator[str]:
    """Tensors that are of one shape in all layers by the config, and of several in the model."""
    tensors, tensors_before = model.state_dict(keep_vars=True), original.state_dict(keep_vars=True)
    first: dict[tuple[str, Any], tuple[str, Any]] = {}
    for name, tensor in tensors.items():
        if name in tensors_before:
            kind = re.sub(r"\.\d+\.", ".*.", name), tensors_before[name].shape
            other, shape = first.setdefault(kind, (name, tensor.shape))
            if shape != tensor.shape:
                yield f"{name} is {_shape_text(tensor)}, {other} is {_shape_text(tensors[other])}"


def stock_differences(
    model: nn.Module, candidate_config: Any, original_numbers: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Differences between our model and the stock one of a config, a sentence each; empty if there are none.

    original_numbers  numbers that modules had before any width was cut: one that still stands there and that no
                method reads says nothing
    """
    stock_module = empty_model_or_reason(type(pretrained(model)), candidate_config, model.dtype)
    if isinstance(stock_module, str):
        return [stock_module] * 10**6  # worse than any number of differing parts
    tensors, stock_tensors = dict(model.state_dict(keep_vars=True)), dict(stock_module.state_dict(keep_vars=True))
    result = [f"{name} is gone" for name in stock_tensors if name not in tensors]
    result += [f"{name} is new" for name in tensors if name not in stock_tensors]
    result += [
        f"{name} is {_shape_text(tensor)}, by the config it is {_shape_text(stock_tensors[name])}"
        for name, tensor in tensors.items()
        if name in stock_tensors and tensor.shape != stock_tensors[name].shape
    ]
    return [
        *result,
        *_module_difference_texts(model, stock_module, original_numbers),
        *modules_reading_stream_width(model, candidate_config),
    ]


def stock_model(model_class: "type[PreTrainedModel]", config: Any, dtype: Any) -> nn.Module:
    """The model that a class makes of a config, in evaluation mode. Raises one of `_REFUSALS`."""
    from ..models.checkpoints.checkpoint import without_library_logs

    with without_library_logs():
        type(config).from_dict(config.to_dict())  # as from_pretrained reads it, which refuses some numbers
        return model_class._from_config(copy.deepcopy(config), dtype=dtype).eval()


def empty_model_or_reason(model_class: "type[PreTrainedModel]", config: Any, dtype: Any) -> nn.Module | str:
    """The model without weights, or why its class does not make one of that config."""
    try:
        with torch.device("meta"):
            return stock_model(model_class, config, dtype)
    except _REFUSALS as error:
        return f"{model_class.__name__} makes no model of the config: {(str(error).splitlines() or [''])[0]}"


def _module_difference_texts(
    model: nn.Module, stock_module: nn.Module, original_numbers: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Modules that only one has, that are of another class or say other numbers of themselves."""
    modules, stock_modules = dict(model.named_modules()), dict(stock_module.named_modules())
    yield from (f"{path} is gone" for path in stock_modules if path not in modules)
    for path, module in modules.items():
        if path not in stock_modules:
            yield f"{path} is new"
        elif type(module) is not type(stock_modules[path]):
            yield f"{path} is a {type(module).__name__}, not a {type(stock_modules[path]).__name__}"
        else:
            values, stock_values = module_numbers(module, model.config), module_numbers(stock_modules[path], None)
            sizes = {
                n: v for n, v in original_numbers.get(path, {}).items() if type(v) is int
            }  # buffers are made of factors
            stale = {n: v for n, v in sizes.items() if n not in _attributes_read_by(module)}
            yield from (
                f"{path}.{name} is {value}, by the config it is {stock_values[name]}"
                for name, value in values.items()
                if name in stock_values and value not in (stock_values[name], stale.get(name))
            )


@cache
def attribute_names_read(cls: type) -> frozenset[str]:
    """Names that methods of a class read of `self` or of anything else, its constructor left out."""
    methods = (
        inspect.unwrap(v)
        for c in cls.__mro__
        if c is not nn.Module and issubclass(c, nn.Module)
        for n, v in vars(c).items()
        if n != "__init__" and inspect.isfunction(v)
    )
    return frozenset(name for method in methods for name in method.__code__.co_names)


def _attributes_read_by(module: nn.Module) -> frozenset[str]:
    kind: type = type(module)
    return attribute_names_read(kind)


def module_numbers(module: nn.Module, shared_config: Any) -> dict[str, int | float]:
    """A module's plain numbers, and those of its config that are not the shared config's."""
    config, common = (
        vars(module).get("config"),
        {} if shared_config is None else public_number_attributes(shared_config),
    )
    config_numbers = {} if config is None else public_number_attributes(config)
    return public_number_attributes(module) | {
        f"config.{n}": v for n, v in config_numbers.items() if common.get(n) != v
    }


def public_number_attributes(owner: Any) -> dict[str, int | float]:
    """Plain numbers among an object's own public attributes."""
    return {
        n: v for n, v in vars(owner).items() if type(v) in (int, float) and not n.startswith("_") and n != "training"
    }


def _agreed_config_values(model: nn.Module, config: Any) -> dict[str, Any]:
    """Config values that the modules agree on, though the root config says otherwise."""
    values: dict[str, set[Any]] = {}
    for module in model.modules():
        module_config = vars(module).get("config")
        sources = [public_number_attributes(module)] + (
            [public_number_attributes(module_config)]
            if module_config is not None and module_config is not model.config
            else []
        )
        for source in sources:
            for name, value in source.items():
                if type(vars(config).get(name)) is int and not _FIXED.search(name):
                    values.setdefault(name, set()).add(value)
    changes = {n: next(iter(v)) for n, v in values.items() if len(v) == 1 and v != {vars(config)[n]}}
    return _with_stated_head_dim(config, changes)


def _with_stated_head_dim(config: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Heads keep their width, where they are fewer or the stream is narrower: it must be said, as it would follow."""
    decisive = {"num_attention_heads", _stream_width_name(config)}
    if decisive.isdisjoint(changes) or getattr(config, "head_dim", None) is not None:
        return dict(changes)
    width, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
    if type(width) is not int or type(heads) is not int:  # stages of several widths; parts with configs of their own
        return dict(changes)
    return {**changes, "head_dim": width // heads}


def _stream_width_name(config: Any) -> str:
    """Name under which a config keeps the width of the residual stream: `n_embd`, `d_model`."""
    return type(config).attribute_map.get("hidden_size", "hidden_size")


def modules_reading_stream_width(model: nn.Module, candidate_config: Any) -> Iterator[str]:
    """Modules that compute with the width of the stream as a config says it, as some scale what they embed."""
    name = _stream_width_name(candidate_config)
    if vars(candidate_config).get(name) == vars(model.config).get(name):
        return
    for path, module in model.named_modules():
        names = _attributes_read_by(module) - vars(module).keys() if "config" in vars(module) else set()
        if not names.isdisjoint({name, "hidden_size"}) or any(
            _property_changes(attribute, model.config, candidate_config) for attribute in names
        ):
            yield f"{path or type(module).__name__} computes with `{name}` of its config"


def _property_changes(name: str, config: Any, candidate_config: Any) -> bool:
    """Whether the config's class computes another number of the candidate, as MiniCPM3's `logits_scaling`."""
    is_property = isinstance(getattr(type(config), name, None), property)
    return is_property and getattr(config, name) != getattr(candidate_config, name)


def _candidate_config_changes(model: nn.Module, config: Any) -> Iterator[dict[str, Any]]:
    """Single values that would explain a shape: one for each size of the config and new size of a tensor."""
    stock_module = empty_model_or_reason(type(pretrained(model)), config, model.dtype)
    if isinstance(stock_module, str):
        return
    stock_tensors = dict(stock_module.state_dict(keep_vars=True))
    pairs = {
        (stated, actual)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name in stock_tensors
        for stated, actual in zip(stock_tensors[name].shape, tensor.shape, strict=False)
        if stated != actual
    }
    built = dict(stock_module.named_modules())
    pairs |= {
        (public_number_attributes(built[path])[name], value)
        for path, module in model.named_modules()
        if path in built
        for name, value in public_number_attributes(module).items()
        if public_number_attributes(built[path]).get(name, value) != value
    }
    stated_names = {
        n for module in model.modules() for n in public_number_attributes(module) if n in _attributes_read_by(module)
    }
    n_guesses = 0
    for name, value in sorted(vars(config).items()):
        if name in stated_names:  # `_agreed_config_values` reads it: shapes do not decide it
            continue
        if not _WIDTHS.search(name) or _FIXED.search(name) or (value is not None and type(value) is not int):
            continue
        for stated, actual in sorted(pair for pair in pairs if pair[0]):  # of nothing no number is a share
            fits = actual if value is None or value == stated else value * actual / stated
            if fits == int(fits) and fits > 0 and n_guesses < _LONGEST_SEARCH:
                n_guesses += 1
                yield _with_stated_head_dim(config, {name: int(fits)})


def _shape_text(tensor: Any) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"

"""Numbers of a config, held against the weights that are there, before anything is made from them.

A config comes from anybody. One that asks for ten million layers takes hours and all memory to be found wrong by
building it; the headers of the weights say at once that they are not there.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ....dsl.syntax.diagnostics import Fault
from .safetensors_header import TensorSlot

invalid_config = Fault(
    "bad-config", "A model's config.json can't be read or does not say what the model is.", exit="environment"
)

_REPEATS = re.compile(
    r"(?!.*(_head|_size|_dim|theta|_ids?$|token|multiple|window|expert_capacity|interval|period))"
    r".*(layer|block|expert|depth|stage|stack)s?.*"
)
_FREE = re.compile(
    r".*(position|theta|token|_id|seed|version|window|max_|_length|context|limit|chunk|norm|eps|base"
    r"|expert_capacity|factor|scaling|interval|every|period|offset|index|indices|freq|timescale|bins|classes_map).*"
)
_ROWS = {("doge", "num_experts")}  # its experts are rows of one embedding, 16,384 where there is no mixture, too
_INPUT_SIZES = re.compile(
    r"vocab_size|num_channels|image_size|num_mel_bins|max_source_positions"
)  # what inputs are made by
_COUNTS = re.compile(r"(num|n)_")
_DEEPEST = 24
WITHOUT_WEIGHTS = {"layers": 4096, "size": 1 << 24}  # of models with random weights


def refuse_excessive_config_numbers(
    config: Mapping[str, Any], slots: Mapping[str, TensorSlot] | None, label: str, size_factor: int = 1
) -> None:
    """Reject (bad-config) where a number is larger than any that the weights have.

    slots         the tensors that are there; None for a model that gets random weights
    size_factor   how many times as large the model was whose weights these are
    """
    _refuse_indivisible_head_counts(config, label)
    if slots is None:
        layers, size = WITHOUT_WEIGHTS["layers"], WITHOUT_WEIGHTS["size"]
    else:
        stacked = [max(slot.shape) for slot in slots.values() if len(slot.shape) > 2]
        layers = size_factor * max([len(slots), *stacked])
        size = size_factor * max([1 << 16, *(math.prod(slot.shape) for slot in slots.values())])
    for name, value in _iterate_config_numbers(config, "", 0):
        key = name.rpartition(".")[2]
        counts = _REPEATS.fullmatch(key) and (config.get("model_type"), name) not in _ROWS
        if value < 1 and _INPUT_SIZES.fullmatch(key):
            raise invalid_config(
                f"{label}: `{name}` of the config is {value}", help="take the model's own config.json"
            ).rejection()
        bound = layers if counts else 1 << 40 if _FREE.fullmatch(key) else size
        if (value < 0 and _COUNTS.match(key)) or math.isnan(value):
            raise invalid_config(
                f"{label}: `{name}` of the config is {value}", help="take the model's own config.json"
            ).rejection()
        if abs(value) > bound and type(value) is int:
            reason = "" if slots is None else ", which the weights don't have room for"
            raise invalid_config(
                f"{label}: `{name}` of the config is {value}{reason}", help="take the model's own config.json"
            ).rejection()


def _refuse_indivisible_head_counts(config: Mapping[str, Any], label: str) -> None:
    """Reject groups of query heads that are not equally large: no attention computes with them."""
    queries, keys = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if type(queries) is int and type(keys) is int and queries > keys > 0 and queries % keys:
        raise invalid_config(
            f"{label}: the config has {queries} attention heads (`num_attention_heads`), which "
            f"{keys} of keys and values (`num_key_value_heads`) do not divide",
            help="take the model's own config.json",
        ).rejection()


def _iterate_config_numbers(value: Any, name: str, depth: int) -> Iterator[tuple[str, int | float]]:
    if depth > _DEEPEST:
        raise invalid_config("the config is nested too deep", help="take the model's own config.json").rejection()
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _iterate_config_numbers(item, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _iterate_config_numbers(item, name, depth + 1)
    elif type(value) in (int, float):
        yield name, value

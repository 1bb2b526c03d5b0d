"""Difference between a step's key and that of a cached result, in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...dsl.checker.value_text import plain_value_text
from ...dsl.checker.values import value_from_json
from .safe_read import MALFORMED
from .sealed_json import canonical_json

_FULL_REASONS = {"input": "the cached results are of another model", "format": "cached results have another form now"}
_NAMED = {  # parts that hold hashes, by the names inside of them
    "data": "the rows of `{}` are others",
    "files": "the file of `{}` is another",
    "source": "the code of the {} has changed",
}


def first_difference_text(field_name: str, cached_value: Any, current_value: Any) -> str:
    """The first thing in which a part differs: "`keep` was 50% and is 75%"."""
    if field_name in _FULL_REASONS:
        return _FULL_REASONS[field_name]
    if field_name == "step":
        field_name, cached_value, current_value = "", cached_value["args"], current_value["args"]
    if isinstance(cached_value, Mapping) and isinstance(current_value, Mapping):
        name = next(
            k
            for k in (*current_value, *cached_value)
            if k not in current_value or k not in cached_value or current_value[k] != cached_value[k]
        )
        if field_name in _NAMED:
            return _NAMED[field_name].format(name)
        return f"`{name}` was {_value_text(cached_value.get(name))} and is {_value_text(current_value.get(name))}"
    return f"`{field_name}` was {_value_text(cached_value)} and is {_value_text(current_value)}"


def _value_text(value: Any) -> str:
    """A value as a recipe writes it, or as JSON; the middle of a long one is left out."""
    try:
        text = plain_value_text(value_from_json(value)) if not isinstance(value, str) else value
    except MALFORMED:
        text = canonical_json(value)
    return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"


def cache_miss_reason_text(key_fields_of_steps: Sequence[Mapping[str, Any]], key_fields: Mapping[str, Any]) -> str:
    """Reason why a step is not in the cache: the first part that differs from its nearest kin.

    key_fields_of_steps   parts of finished steps, last used first
    """
    word = key_fields["step"]["word"]
    kin = [parts for parts in key_fields_of_steps if parts.get("step", {}).get("word") == word]
    if not kin:
        return f"no result of {word} is kept"
    kin = [parts for parts in kin if any(parts.get(k) == key_fields[k] for k in ("input", "step"))]
    if not kin:
        return f"no result of {word} is kept for this model"
    nearest = max(kin, key=lambda parts: sum(parts.get(k) == v for k, v in key_fields.items()))
    for name, value in key_fields.items():
        if nearest.get(name) != value:
            return first_difference_text(name, nearest.get(name), value)
    return "kept, but some of its tensors are gone"

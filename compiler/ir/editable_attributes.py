"""Attributes of modules and configs that stored edits may change, and their allowed values.

Passes make things smaller: numbers of heads and layers, widths, lists with an entry per layer. So a stored value is a
number no larger than the one that is there, or what is left of a list. Text, and with it the names of backends, of
code and of quantisation methods, is never set.
"""

import math
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig

from ..core.safe_read import Unlisted
from .layers.fast_mixers import MARK
from .surgery import module_at, split_parent_and_name
from .traced_integers import LAYER_INDICES

_PER_LAYER = ("layer", "block", "pattern")
_MISSING = object()


def refuse_unlisted_attribute(model: nn.Module, path: str, value: Any) -> None:
    """Raises Unlisted unless an attribute is there and the value is one that a pass could have left in it."""
    owner, name = split_parent_and_name(path)
    if name == MARK and isinstance(value, bool):
        module_at(model, owner)
        return
    current = value_or_missing(model, path)
    if current is _MISSING or name.startswith("_") or name in LAYER_INDICES:
        raise Unlisted(f"a value for {path}, which is no number or list that effc changes")
    if not _is_allowed_value(current, value, name):
        raise Unlisted(f"a value for {path} that no pass leaves there")


def value_or_missing(model: nn.Module, path: str) -> Any:
    """The value at a path of modules that may go through one's config, `_MISSING` where there is none."""
    parts, holder = path.split("."), cast("nn.Module | PreTrainedConfig | None", model)
    while len(parts) > 1 and isinstance(holder, nn.Module) and parts[0] in holder._modules:
        holder = holder._modules[parts.pop(0)]
    while len(parts) > 1:
        holder = vars(holder).get(parts.pop(0))
        if not isinstance(holder, PreTrainedConfig):
            return _MISSING
    name = parts[0]
    if isinstance(holder, PreTrainedConfig):
        return getattr(holder, name, _MISSING) if name in vars(holder) or name in holder.attribute_map else _MISSING
    return vars(holder).get(name, _MISSING)


def _is_allowed_value(current: Any, new: Any, name: str) -> bool:
    if isinstance(current, str):
        return (
            any(word in name for word in _PER_LAYER) and isinstance(new, str) and _shortens_or_renumbers(current, new)
        )
    if isinstance(current, (list, tuple)):
        return isinstance(new, (list, tuple)) and _shortens_or_renumbers(current, new)
    if isinstance(current, float):
        return type(new) in (int, float) and math.isfinite(new)
    return type(current) in (bool, int) and type(new) is type(current) and 0 <= new <= current


def _shortens_or_renumbers(current: Any, new: Any) -> bool:
    """Whether a list, or a pattern of letters, is no longer than the one before and holds nothing new but numbers."""
    largest = max((item for item in current if type(item) is int), default=-1)
    return len(new) <= len(current) and all(
        item in current or (type(item) is int and 0 <= item <= largest) for item in new
    )

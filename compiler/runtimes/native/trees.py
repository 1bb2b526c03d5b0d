"""Values of a walk over a graph inside tuples, lists and dicts, and the attributes that a graph reads."""

from collections.abc import Callable
from typing import Any

from torch import nn

from .values import ElementwiseExpr, Rows


def attribute(model: nn.Module, path: str) -> Any:
    """Value that a get_attr of the graph reads."""
    value: Any = model
    for part in filter(None, path.split(".")):
        value = getattr(value, part)
    return value


def mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(tree, (tuple, list)):
        return type(tree)(mapped(part, change) for part in tree)
    if isinstance(tree, dict):
        return {key: mapped(part, change) for key, part in tree.items()}
    return change(tree)


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, (tuple, list)):
        return [leaf for part in tree for leaf in leaves(part)]
    if isinstance(tree, dict):
        return [leaf for part in tree.values() for leaf in leaves(part)]
    return [tree]


def index(value: Any) -> Any:
    return value.index if isinstance(value, Rows) else value


def wrapped(value: Any, pending: ElementwiseExpr | None) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(wrapped(part, pending) for part in value)
    return Rows(value, pending)

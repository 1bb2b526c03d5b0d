"""Calls that give back an operand as it is; a trace leaves them out.

From 5.25 on transformers splits the input of a scan behind its last position, unless a cache records states to go
back to. Without such a cache the graph is the one of earlier releases.
"""

import operator
from collections.abc import Mapping
from typing import Any

import torch

from .proxy import Value


def unchanged_operand(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The operand that a call gives back, with the empty rest where it splits; None where it computes something."""
    if target in (operator.add, operator.sub) and _is_size(args[0]) and type(args[1]) is int and args[1] == 0:
        return args[0]
    if target is torch.tensor_split and len(args) == 2:
        return _split_behind_last(*args, kwargs.get("dim", 0))
    return None


def _split_behind_last(x: Any, indices: Any, dim: int) -> tuple[Any, Any] | None:
    """x, and nothing of it, where the one index is a size that is free in the graph, and x's own along `dim`."""
    if not isinstance(x, Value) or type(indices) not in (list, tuple) or len(indices) != 1 or not _is_size(indices[0]):
        return None
    if indices[0].value != x.value.shape[dim]:
        return None
    return x, x.narrow(dim, indices[0], 0)


def _is_size(operand: Any) -> bool:
    return isinstance(operand, Value) and type(operand.value) is int

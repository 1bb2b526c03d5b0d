"""Queries on a graph: names of calls, their sources, nodes that must stay, uses of the cache."""

import operator
from typing import Any

import torch
from torch import fx
from transformers.cache_utils import Cache

from .layers import leaves


def target_name(node: fx.Node) -> str:
    """Name of a node's call: `view`, `add`, `attention`."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def ancestors(node: fx.Node) -> set[fx.Node]:
    """All nodes that a node is computed from."""
    reached: set[fx.Node] = set()
    todo = [node]
    while todo:
        for used in todo.pop().all_input_nodes:
            if used not in reached:
                reached.add(used)
                todo.append(used)
    return reached


def uses_self_attention_cache(graph: fx.Graph) -> bool:
    """Whether anything in a unit's graph reads or writes the cache of what was said so far; an encoder's is another."""
    return any(
        node.op == "placeholder"
        and node.meta.get("dtype") == "cache"
        and any(user.target is not leaves.cross_update for user in node.users)
        for node in graph.nodes
    )


def caches_kv(graph: fx.Graph) -> bool:
    """Whether a unit's graph keeps keys and values."""
    return any(node.target in (leaves.cache_update, leaves.packed_attention) for node in graph.nodes)


def contains_attention(graph: fx.Graph) -> bool:
    """Whether a unit's graph attends at all: to keys of its own, or to those that a layer before it keeps."""
    return caches_kv(graph) or any(node.target is leaves.attention for node in graph.nodes)


def referenced_paths(graph: fx.Graph) -> set[str]:
    """Paths of modules and attributes that a graph calls or reads."""
    return {node.target for node in graph.nodes if node.op in ("call_module", "get_attr")}


def plain_shape_and_dtype(value: Any) -> tuple[Any, Any]:
    """(shape, dtype) as plain data: of a tuple, tuples of both; of what is no tensor, (None, a word)."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), str(value.dtype).removeprefix("torch.")
    if isinstance(value, torch.Size):
        return None, "size"
    if isinstance(value, (tuple, list)):
        parts = [plain_shape_and_dtype(item) for item in value]
        return tuple(shape for shape, _ in parts), tuple(dtype for _, dtype in parts)
    if isinstance(value, Cache):
        return None, "cache"
    return None, type(value).__name__


def has_side_effects(node: fx.Node) -> bool:
    """Whether a node must stay though nobody uses its result."""
    if node.op in ("placeholder", "output") or node.target is operator.setitem:
        return True
    if node.meta.get("role") == "cache_update":
        return True
    if node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__"):
        return True
    # An opaque module or a method that is handed the cache may write to it.
    return node.op in ("call_method", "call_module") and any(
        used.meta.get("dtype") == "cache" for used in node.all_input_nodes
    )

"""Values that depend on positions and lengths alone, computed from the graph at any length, in float32.

A model of half precision rounds its tables of angles when they are done; the engine computes angles of its own, so
what it is to find is what they were before: every cast to half precision is one to float32 here.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from .values import CACHE, Rows

_HALVES = (torch.bfloat16, torch.float16)
_CASTS = {"bfloat16": "float", "half": "float"}
PLACEHOLDERS = {
    "position_ids": lambda n: torch.arange(n)[None],
    "attention_mask": lambda n: torch.ones((1, n), dtype=torch.int64),
}


class Positions:
    """Runs parts of a graph for a batch of one row with positions 0, 1, ..., n - 1."""

    def __init__(self, model: nn.Module, values: dict[fx.Node, Any]):
        self.model = model
        self._values = values                  # what the plan knows of nodes; tokens' numbers are not needed
        self._memory: dict[int, dict[fx.Node, Any]] = {}

    @torch.no_grad()
    def at(self, node: fx.Node, length: int) -> Any:
        """What a node gives; of rows of tokens, only that there are so many."""
        known = self._memory.setdefault(length, {})
        if node not in known:
            known[node] = self._run(node, length)
        return known[node]

    def forget(self) -> None:
        self._memory.clear()

    def _run(self, node: fx.Node, length: int) -> Any:
        value = self._values.get(node)
        if isinstance(value, Rows):
            return self._stand_in(node, length)
        if value is CACHE:
            return None
        if node.op == "placeholder":
            return PLACEHOLDERS[node.target](length) if node.target in PLACEHOLDERS else None
        if node.op == "get_attr":
            return value
        args, kwargs = (_wide(fx.map_arg(part, lambda n: self.at(n, length))) for part in (node.args, node.kwargs))
        if node.op == "call_method" and node.target in _CASTS:
            return getattr(args[0], _CASTS[node.target])()
        return call(node, self.model, args, kwargs)

    def _stand_in(self, node: fx.Node, length: int) -> Tensor:
        dtype = _wide(getattr(torch, str(node.meta.get("dtype")), torch.float32))
        if dtype == torch.int64:
            return torch.zeros((1, length), dtype=dtype)
        return torch.zeros((1, length, 1), dtype=dtype)


def _wide(value: Any) -> Any:
    """Arguments of a call, with float32 in place of types of half precision."""
    if isinstance(value, torch.dtype):
        return torch.float32 if value in _HALVES else value
    if isinstance(value, tuple | list):
        return type(value)(map(_wide, value))
    if isinstance(value, dict):
        return {key: _wide(part) for key, part in value.items()}
    return value


def call(node: fx.Node, model: nn.Module, args: Any, kwargs: Any) -> Any:
    """Run a node with these arguments."""
    if node.op == "call_module":
        return model.get_submodule(node.target)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    assert node.op == "call_function", f"a {node.op} is not called"
    return node.target(*args, **kwargs)

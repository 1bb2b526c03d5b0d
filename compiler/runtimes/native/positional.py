"""Values that depend on positions and lengths alone, computed from the graph at any length, in float32.

A model of half precision rounds its tables of angles when they are done; the engine computes angles of its own, so
what it is to find is what they were before: every cast to half precision is one to float32 here.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from ...ir.capture.sample import first_position_id
from .calls import operation_name
from .layout import Layout
from .values import CACHE, AllPositions, CachedRows, Rows, SourceTokens

_HALVES = (torch.bfloat16, torch.float16)
_NO_ID = 1 << 40
_WRITABLE = 1 << 22  # numbers of a stand-in that has memory of its own
_CASTS = {"bfloat16": "float", "half": "float"}


class Positions:
    """Runs parts of a graph for a batch of one row with the first n positions."""

    def __init__(
        self,
        model: nn.Module,
        values: dict[fx.Node, Any],
        layout: Layout,
        shape: torch.Size,
        source: "Positions | None" = None,
    ):
        self.model, self.layout, self.shape, self.source = model, layout, shape, source
        self._values = values  # what the plan knows of nodes; tokens' numbers are not needed
        self._memory: dict[int, dict[fx.Node, Any]] = {}
        self._first = first_position_id(model)

    @torch.no_grad()
    def at(self, node: fx.Node, length: int) -> Any:
        """Value of a node for a length; of rows of tokens, only their number."""
        known = self._memory.setdefault(length, {})
        if node not in known:
            known[node] = self._evaluate_at_length(node, length)
        return known[node]

    def max_positions_of(self, node: fx.Node, context: int) -> int:
        """Number of positions of a context that a node has values for: some tables are shorter."""
        least, upper = 0, context
        while least < upper:
            middle = upper if least == 0 and upper == context else (least + upper + 1) // 2
            try:
                self.at(node, middle)
                least = middle
            except (IndexError, RuntimeError):  # a gather beyond the end is a RuntimeError
                upper = middle - 1
        return least

    @torch.no_grad()
    def uses_only_length_of_ids(self, node: fx.Node) -> bool:
        """Whether a module that is handed token ids asks only how many there are: no table has rows of such ids."""
        ids = torch.full((1, 3), _NO_ID)

        def operand(used: fx.Node) -> Any:
            return ids if isinstance(self._values.get(used), Rows) else self.at(used, 3)

        try:
            args, kwargs = (fx.map_arg(part, operand) for part in (node.args, node.kwargs))
            return isinstance(run_node(node, self.model, args, kwargs), Tensor)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False

    def grows_with_length(self, node: fx.Node) -> bool:
        """Whether a longer row has more of what a node gives."""
        try:
            short, long = (self.at(node, length) for length in (3, 5))
        except (RuntimeError, TypeError, ValueError, IndexError):  # made for something else than one row
            return False
        return isinstance(short, Tensor) and short.shape != long.shape

    def knows(self, node: fx.Node) -> bool:
        return node in self._values

    def forget(self) -> None:
        self._memory.clear()

    def _evaluate_at_length(self, node: fx.Node, length: int) -> Any:
        if self.source is not None and self.source.knows(node):
            return self.source.at(node, length)  # of a source that is as long
        value = self._values.get(node)
        assert not isinstance(value, SourceTokens), f"{node.name} is none of the source's"
        rows = value.rows if isinstance(value, CachedRows) else value
        if isinstance(rows, Rows):
            return self._stand_in(node, rows, length)
        if isinstance(value, AllPositions):
            return torch.arange(length).expand(1, length, length)
        if value is CACHE:
            return None
        if node.op == "placeholder":
            return self._default_input(str(node.target), length)
        if node.op == "get_attr":
            return value
        operands: Any = (fx.map_arg(part, lambda n: self.at(n, length)) for part in (node.args, node.kwargs))
        args, kwargs = operands
        if args and args[0] is None and (node.op == "call_method" or operation_name(node) == "getitem"):
            return None  # a part of a mask that hides nothing, or its like
        return call_in_float32(node, self.model, args, kwargs)

    def _default_input(self, name: str, length: int) -> Tensor | None:
        if name in ("position_ids", "decoder_position_ids"):
            return torch.arange(self._first, self._first + length)[None]
        is_mask = name in ("attention_mask", "decoder_attention_mask")
        return torch.ones((1, length), dtype=torch.int64) if is_mask else None

    def _stand_in(self, node: fx.Node, rows: Rows, length: int) -> Tensor:
        """Zeros in the shape that rows of tokens have."""
        dtype = _halves_to_float32(getattr(torch, str(node.meta.get("dtype")), torch.float32))
        shape = torch.Size(self.shape_for_length(rows.index, length)[0])
        return torch.zeros(shape if shape.numel() <= _WRITABLE else (), dtype=dtype).expand(shape)

    def shape_for_length(self, index: Tensor, length: int) -> tuple[tuple[int, ...], int]:
        """The shape of a value for one row of `length` tokens, and the axis of those."""
        batch, sample_length = self.shape
        _, token = self.layout.registers_and_tokens(index.reshape(-1))
        token, shape, token_axis = token.view(index.shape), [], -1
        for axis, size in enumerate(index.shape):
            line = token.movedim(axis, 0).reshape(size, -1)[:, 0]
            size //= batch if len((line // sample_length).unique()) == batch else 1
            if len((line % sample_length).unique()) == sample_length:
                size, token_axis = size // sample_length * length, axis
            shape.append(size)
        return tuple(shape), token_axis


def _halves_to_float32(value: Any) -> Any:
    """Arguments of a call, with float32 in place of types of half precision."""
    if isinstance(value, torch.dtype):
        return torch.float32 if value in _HALVES else value
    if isinstance(value, tuple | list):
        return type(value)(map(_halves_to_float32, value))
    if isinstance(value, dict):
        return {key: _halves_to_float32(part) for key, part in value.items()}
    return value


def call_in_float32(node: fx.Node, model: nn.Module, args: Any, kwargs: Any) -> Any:
    """Run a node with these arguments, with float32 wherever it casts to half precision."""
    if node.op == "call_method" and node.target in _CASTS:
        return getattr(args[0], _CASTS[node.target])()
    return run_node(node, model, _halves_to_float32(args), _halves_to_float32(kwargs))


def run_node(node: fx.Node, model: nn.Module, args: Any, kwargs: Any) -> Any:
    """Run a node with these arguments."""
    if node.op == "call_module":
        return model.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert node.op == "call_function" and not isinstance(node.target, str), f"a {node.op} is not called"
    return node.target(*args, **kwargs)

"""Integers that remember which module attribute they were read from.

A plain `self.num_heads` ends as the literal 8 in a `view`; after pruning nobody could tell which 8 it was.
While a unit is traced, the plain ints of its modules and configs are exchanged for `Sourced` ones, and every
literal that reaches the graph is recorded with its source expression (`node.meta["ints"]`).
"""

import operator
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# The attributes whose value differs between otherwise equal layers: they stay reads in the graph.
LAYER_INDICES = frozenset({"layer_idx", "layer_id"})

_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
}
_TOKEN = re.compile(r"\s*(//|[()+\-*]|[\w.]+)")
_LONGEST_SOURCE = 400


class TracedInt(int):
    """An int with `source`: an expression over attribute paths, e.g. `mlp.width // 2`.

    Paths start below the traced root; those that start with `config.` mean the config of the module in whose
    forward they are used (the last entry of the node's scope).
    """

    source: str

    def __new__(cls, value: int, source: str) -> "TracedInt":
        self = super().__new__(cls, value)
        self.source = source
        return self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)  # copies and pickles are plain: provenance is a matter of one trace

    def __neg__(self) -> "TracedInt":
        return TracedInt(-int(self), f"(0 - {self.source})")


def _define_arithmetic(name: str, symbol: str) -> None:
    apply = getattr(operator, name)

    def forward(self, other) -> Any:
        if type(other) not in (int, TracedInt):
            return getattr(int, f"__{name}__")(self, other)
        return TracedInt(apply(int(self), int(other)), f"({self.source} {symbol} {source_expression_of(other)})")

    def backward(self, other) -> Any:
        if type(other) not in (int, TracedInt):
            return getattr(int, f"__r{name}__")(self, other)
        return TracedInt(apply(int(other), int(self)), f"({source_expression_of(other)} {symbol} {self.source})")

    setattr(TracedInt, f"__{name}__", forward)
    setattr(TracedInt, f"__r{name}__", backward)


for _name, _symbol in (("add", "+"), ("sub", "-"), ("mul", "*"), ("floordiv", "//")):
    _define_arithmetic(_name, _symbol)


def source_expression_of(value: int) -> str:
    """The source expression of an int; a plain one is its own."""
    if isinstance(value, TracedInt):
        return value.source
    return repr(int(value)) if value >= 0 else f"(0 - {-int(value)})"


class LayerIndex:
    """A layer's own number while it is traced: handed on it is a read, decided by it makes the layer special.

    No subclass of int: Python would index a list with it without asking, and layers that pick from a list by
    their number would pass for equal. `tracer.index_used` is set when Python asks for the number.
    """

    def __init__(self, value: int, source: str, tracer: Any):
        self.value = value
        self.source = source
        self.tracer = tracer

    def number(self) -> TracedInt:
        """The number, for Python to decide or reckon by."""
        if self.tracer.on:  # not while a leaf runs: that reads the attribute again whenever the graph runs
            self.tracer.index_used = True
        return TracedInt(self.value, self.source)

    def __int__(self) -> int:
        return int(self.number())

    def __index__(self) -> int:
        return int(self.number())

    def __hash__(self) -> int:
        return hash(int(self.number()))

    def __bool__(self) -> bool:
        return bool(self.number())

    def __repr__(self) -> str:
        return repr(self.value)


def _delegate(name: str) -> None:
    def apply(self: LayerIndex, *operands: Any) -> Any:
        plain = [other.number() if isinstance(other, LayerIndex) else other for other in operands]
        return getattr(self.number(), name)(*plain)

    setattr(LayerIndex, name, apply)


for _name in (
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "neg",
    "abs",
    "float",
    *(
        side + operation
        for operation in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow")
        for side in ("", "r")
    ),
):
    _delegate(f"__{_name}__")


def evaluate_expression(source: str, read_attribute: Callable[[str], int]) -> int:
    """The value of a source expression; `read_attribute` gives the value of an attribute path.

    Accepts paths, whole numbers and fully bracketed + - * // only: the text may come from a file.
    Raises ValueError.
    """
    tokens = _TOKEN.findall(source[:_LONGEST_SOURCE])
    value = _evaluate_tokens(tokens, read_attribute)
    if tokens or "".join(source.split()) != "".join(_TOKEN.findall(source)):
        raise ValueError(f"`{source[:40]}` is no expression over attributes")
    return value


def _evaluate_tokens(tokens: list[str], read_attribute: Callable[[str], int]) -> int:
    token = tokens.pop(0) if tokens else ""
    if token.isdecimal():
        return int(token)
    if token and (token[0].isalpha() or token[0] == "_"):
        return read_attribute(token)
    if token != "(":
        raise ValueError("an expression over attributes ends early")
    left = _evaluate_tokens(tokens, read_attribute)
    symbol = tokens.pop(0) if tokens else ""
    right = _evaluate_tokens(tokens, read_attribute)
    if symbol not in _OPERATIONS or not tokens or tokens.pop(0) != ")":
        raise ValueError("an expression over attributes needs brackets and + - * //")
    if symbol == "//" and right == 0:
        raise ValueError("division by zero in the source of an integer")
    return _OPERATIONS[symbol](left, right)


@contextmanager
def with_traced_integers(paths: dict[nn.Module, str], tracer: Any) -> Iterator[None]:
    """Exchange the plain ints of these modules, and of their configs, for `Sourced` ones; undo at the end.

    Modules of torch itself keep theirs: they are leaves, and their C++ callees want exact ints.
    """
    undo: list[tuple[dict[str, Any], str, int]] = []
    visited: set[int] = set()
    try:
        for module, path in paths.items():
            if not type(module).__module__.startswith("torch."):
                _swap_integers_for_traced(vars(module), f"{path}." if path else "", undo, tracer)
            config = vars(module).get("config")
            if config is not None and id(config) not in visited:
                visited.add(id(config))
                _swap_integers_for_traced(vars(config), "config.", undo, tracer)
        yield
    finally:
        for attributes, name, value in undo:
            attributes[name] = value


def _swap_integers_for_traced(
    attributes: dict[str, Any], prefix: str, undo: list[tuple[dict[str, Any], str, int]], tracer: Any
) -> None:
    plain = [
        (name, value)
        for name, value in attributes.items()
        if type(value) is int and name.isidentifier() and not name.startswith("_")
    ]
    for name, value in plain:
        undo.append((attributes, name, value))
        attributes[name] = (
            LayerIndex(value, prefix + name, tracer) if name in LAYER_INDICES else TracedInt(value, prefix + name)
        )

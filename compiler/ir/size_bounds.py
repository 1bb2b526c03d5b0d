"""Bounds on the plain numbers of a stored graph, before anything is computed.

Python's integers have no end and no signal stops them: `10 ** 10 ** 9`, or forty squarings in a row, take hours, on
the meta device too. Every node that may be a plain integer has the most bits that it can have, and one that may be a
tuple the most items, since `+` joins and `*` repeats them. What comes from a call has few; only operators let them
grow.
"""

import operator
from typing import Any

from torch import fx

_SMALL_SIZE = 64  # of what a call gives: a number of 64 bits, or a tuple of as many
_MAX_SIZE = 1 << 20  # a product of two such numbers takes milliseconds
_MAX_TOTAL = 1 << 28


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NUMBERS = _words("numel ndimension dim item get_seq_length get_query_offset")
_SIZES = _words("size stride shape")  # tuples of numbers; those below are of tensors
_SEVERAL = _words("""
    chunk split split_with_sizes tensor_split unbind unsafe_chunk unsafe_split topk sort cummax std_mean var_mean
""")
_SEVERAL_BY = _words("max min median")  # along a dimension: the values and where they are
_SELF = _words("real imag data")
_JOINS, _REPEATS = {operator.add, operator.iadd}, {operator.mul, operator.imul}
_FRACTIONS = {operator.truediv, operator.itruediv}
_OPERATORS = {f for f in vars(operator).values() if callable(f)} - {getattr, operator.getitem, operator.setitem}


class UnboundedSize(ValueError):
    """A number or a tuple that could grow past what is computed in a moment; the text says where."""


def check_growth(graph: fx.Graph) -> None:
    """Raises UnboundedSize where operators on plain numbers or tuples could take more than a moment."""
    growth = _SizeBounds()
    for node in graph.nodes:
        growth.bound_node(node)


def _has_dimension(node: fx.Node) -> bool:
    return "dim" in node.kwargs or (len(node.args) > 1 and isinstance(node.args[1], int))


class _SizeBounds:
    def __init__(self) -> None:
        self.sizes: dict[fx.Node, int] = {}  # of what may be a number or a tuple; others are tensors and fractions
        self.numbers: set[fx.Node] = set()
        self.tuples: set[fx.Node] = set()
        self.tensors: set[fx.Node] = set()  # several of them, or one
        self.total = 0

    def bound_node(self, node: fx.Node) -> None:
        if node.op == "call_function" and node.target in _OPERATORS:
            self.bound_operator(node)
        elif node.op == "call_function" and node.target is operator.getitem:
            self.bound_getitem(node)
        elif node.target is getattr and node.args[1] in _SELF:
            self.bound_attribute(node)
        elif node.op == "placeholder":
            self.numbers.add(node)
        elif node.op in ("call_function", "call_method"):
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            name = node.args[1] if node.target is getattr else name
            of_one = name in _SIZES and (len(node.args) > 1 or bool(node.kwargs)) and node.target is not getattr
            if name in _NUMBERS or of_one:
                self.numbers.add(node)
            elif name in _SIZES or name in _SEVERAL or (name in _SEVERAL_BY and _has_dimension(node)):
                self.tuples.add(node)
            if name in _SEVERAL or name in _SEVERAL_BY:
                self.tensors.add(node)
        size = self.sizes.setdefault(node, _SMALL_SIZE)
        self.total += size
        if size > _MAX_SIZE or self.total > _MAX_TOTAL:
            raise UnboundedSize(f"numbers without end at {node.name}")

    def bound_attribute(self, node: fx.Node) -> None:
        """A number's `real` is the number."""
        source = node.args[0]
        assert isinstance(source, fx.Node), f"{node.name} of no value"
        for kind in (self.numbers, self.tuples, self.tensors):
            if source in kind:
                kind.add(node)
        self.sizes[node] = self.sizes[source]

    def bound_getitem(self, node: fx.Node) -> None:
        """An item is a number or a tensor, as its tuple holds them; a slice of a tuple is one."""
        source, index = node.args
        if isinstance(source, fx.Node) and source in self.tensors:
            self.tensors.add(node)
        elif not isinstance(index, slice) and (self.is_tuple(source) or self.is_number(source)):
            self.numbers.add(node)
        if isinstance(index, slice) and self.is_tuple(source):
            self.tuples.add(node)
            self.sizes[node] = self.size_bound(source)

    def is_number(self, value: Any) -> bool:
        return value in self.numbers if isinstance(value, fx.Node) else isinstance(value, int)

    def is_tuple(self, value: Any) -> bool:
        return value in self.tuples if isinstance(value, fx.Node) else isinstance(value, (tuple, list))

    def size_bound(self, value: Any) -> int:
        if isinstance(value, fx.Node):
            return self.sizes[value]
        if isinstance(value, (tuple, list)):
            return len(value)
        if isinstance(value, str):
            raise UnboundedSize("arithmetic of a text")
        return value.bit_length() if isinstance(value, int) else _SMALL_SIZE

    def bound_operator(self, node: fx.Node) -> None:
        sizes = [self.size_bound(value) for value in node.args]
        if node.target in _JOINS and all(map(self.is_tuple, node.args)):
            self.tuples.add(node)
            self.sizes[node] = sum(sizes)
        if node.target in _REPEATS:
            self.bound_repetition(node)
        if node.target in _FRACTIONS or not all(map(self.is_number, node.args)):
            return
        self.numbers.add(node)
        bits = max(sizes) + 1
        if node.target in _REPEATS:
            bits = sum(sizes)
        elif node.target in (operator.pow, operator.lshift):
            times = node.args[1]
            if not isinstance(times, int):
                raise UnboundedSize(f"a power without end at {node.name}")
            times = abs(times)
            bits = sizes[0] + times if node.target is operator.lshift else sizes[0] * max(1, times)
        self.sizes[node] = max(bits, self.sizes.get(node, 0))

    def bound_repetition(self, node: fx.Node) -> None:
        """A tuple as many times as a number says."""
        for items, times in (node.args, reversed(node.args)):
            if self.is_tuple(items) and (isinstance(times, int) or self.is_number(times)):
                if not isinstance(times, int):
                    raise UnboundedSize(f"a tuple without end at {node.name}")
                self.tuples.add(node)
                self.sizes[node] = max(self.size_bound(items) * abs(times), self.sizes.get(node, 0))

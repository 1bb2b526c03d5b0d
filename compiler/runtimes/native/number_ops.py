"""Operations on numbers of tokens: moves, elementwise functions, sums and products, means."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from . import calls, linears, reductions
from .layout import IrregularColumns
from .positional import call_node
from .trees import index, wrapped
from .values import ElementwiseExpr, ExpertChoice, FirstTokenRows, Positional, Rows, picks_first

if TYPE_CHECKING:
    from .reader import Reader

_INPLACE_OPS = {"add_": "add", "sub_": "sub", "mul_": "mul"}


class FunctionRules:
    """The part of a `Reader` that knows functions of torch."""

    def __init__(self, reader: "Reader"):
        self.reader = reader

    def lower_function(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Result of a function of numbers of tokens."""
        name, first = calls.operation(node), args[0]
        if name in calls.SIZE_CALLS and isinstance(first, Rows):
            return call_node(node, self.reader.model, (first.index, *args[1:]), kwargs)
        if name in calls.SAME and isinstance(first, (Rows, ExpertChoice)):
            return first
        if isinstance(first, (tuple, list)) and name == "getitem":
            return first[args[1]]
        if name in ("new_empty", "new_zeros", "zeros_like") and isinstance(first, Rows):
            return _zeros(first, *args[1:])
        if name == "copy_" and isinstance(first, Rows) and isinstance(args[1], Rows):
            first.index.copy_(self.reader.materialised(args[1]).index)  # a part of what is filled piece by piece
            return first
        if name in _INPLACE_OPS and isinstance(first, Rows):
            value = self._lower_binary(node, _INPLACE_OPS[name], *args)
            self._record_in_place(node, value)
            return value
        if name == "setitem" and isinstance(first, Rows) and isinstance(args[2], Rows):
            return self._replaced(node, first, args[1], args[2])
        if name in calls.JOINS:
            return self._concatenate(node, args, kwargs)
        if name == "getitem" and isinstance(first, Rows) and picks_first(first, args[1]):
            return FirstTokenRows(first)
        if name in calls.MOVES and isinstance(first, Tensor):  # into the shape of numbers of tokens
            return call_node(node, self.reader.model, (first, *map(index, args[1:])), kwargs)
        if name in calls.MOVES and isinstance(first, Rows):
            return wrapped(calls.run_on_indices(node, (first.index, *map(index, args[1:])), kwargs), first.pending)
        if name == "pad" and isinstance(first, Rows):
            padded = self.reader.shifting.lower_padding(first, *args[1:], **kwargs)
            if padded is not None:
                return padded
        if name in calls.UNARY and isinstance(first, Rows):
            return Rows(first.index, _defer(node, name, first.pending, args[1:], kwargs))
        if name == "where":
            return self._lower_where(node, *args)
        if name in reductions.KINDS and isinstance(first, Rows):
            return reductions.lower_reduction(self.reader, node, name, first, args[1:], kwargs)
        if name in calls.BINARY:
            return self._lower_binary(node, name, *args)
        if name == "linear":
            return self._functional_linear(node, *args, **kwargs)
        if name in ("matmul", "bmm"):
            if not all(isinstance(part, Rows) for part in args):
                return self.reader.scanning.lower_matrix_product(node, *args)
            if self.reader.writing.is_score_product(*args):
                return self.reader.writing.begin(node)
            return reductions.lower_matrix_product(self.reader, node, *args)
        reason = f"`{name}` of numbers that differ from token to token is not among the engine's steps"
        raise self.reader.rejection(node, reason)

    def _replaced(self, node: fx.Node, x: Rows, subscript: Any, replacement: Rows) -> None:
        """A part of a value is another from here on."""
        index = self.reader.without_pending(x).index.clone()
        index[subscript] = self.reader.materialised(replacement).index
        self._record_in_place(node, Rows(index))

    def _record_in_place(self, node: fx.Node, value: Rows) -> None:
        """Record an in-place change: later readers of the changed node read the new value."""
        target = node.args[0]
        assert isinstance(target, fx.Node), f"{node.name} changes no value"
        base, order = target, {other: i for i, other in enumerate(node.graph.nodes)}
        while base.args and calls.operation(base) in calls.MOVES | calls.SAME and isinstance(base.args[0], fx.Node):
            base = base.args[0]
            if any(order[user] > order[node] for user in base.users):
                raise self.reader.rejection(node, "it changes a value through another that is still read")
        self.reader.values[target] = value

    def _concatenate(self, node: fx.Node, args: Any, kwargs: Any) -> Rows:
        if not all(isinstance(part, Rows) for part in args[0]):
            raise self.reader.rejection(node, "it joins numbers of tokens with others")
        parts = [self.reader.without_pending(part).index for part in args[0]]
        joined = calls.run_on_indices(node, (parts, *args[1:]), kwargs)
        assert isinstance(joined, Tensor), f"{node.name} joins into several"
        return Rows(joined)

    def _lower_binary(self, node: fx.Node, name: str, a: Any, b: Any) -> Any:
        function = calls.BINARY[name]
        for x, y in ((a, b), (b, a)):
            single = isinstance(y, (int, float)) or (isinstance(y, Tensor) and y.dim() == 0)
            if isinstance(x, Rows) and single:
                operands = (x.pending, float(y)) if x is a else (float(y), x.pending)
                return Rows(x.index, ElementwiseExpr(function, operands, node))
        if isinstance(a, Rows) and isinstance(b, Rows):
            if a.index.shape == b.index.shape and torch.equal(a.index, b.index):
                return Rows(a.index, ElementwiseExpr(function, (a.pending, b.pending), node))
            return self.elementwise_of_two(node, name, a, b)
        for x, y in ((a, b), (b, a)):
            if isinstance(x, Rows) and isinstance(y, Tensor):
                return self.elementwise_with_vector(node, name, x, y, swapped=x is b)
            if isinstance(x, Rows) and isinstance(y, Positional) and name in ("add", "mul"):
                table = self.reader.tables.positional_rows(node, y)
                return x if table is None else self.elementwise_of_two(node, name, x, table)
        raise self.reader.rejection(node, f"`{name}` of these operands is not among the engine's steps")

    def _lower_where(self, node: fx.Node, which: Any, a: Any, b: Any) -> Rows:
        """A choice by a number of what is made of that number."""
        parts = [part for part in (which, a, b) if isinstance(part, Rows)]
        numbers = [part for part in (a, b) if isinstance(part, (int, float))]
        same_source = all(torch.equal(part.index, parts[0].index) for part in parts[1:])
        if not isinstance(which, Rows) or len(parts) + len(numbers) != 3 or not same_source:
            raise self.reader.rejection(node, "a choice between values that more than one number decides")
        operands = [part.pending if isinstance(part, Rows) else float(part) for part in (which, a, b)]
        return Rows(which.index, ElementwiseExpr(torch.where, tuple(operands), node))

    def product(self, node: fx.Node, a: Rows, b: Rows) -> Rows:
        return self.elementwise_of_two(node, "mul", a, b)

    def elementwise_of_two(self, node: fx.Node, name: str, a: Rows, b: Rows) -> Rows:
        if name in ("sub", "isub"):
            b = Rows(b.index, ElementwiseExpr(calls.BINARY["mul"], (b.pending, -1.0)))
        if name in ("truediv", "itruediv", "div"):
            b = Rows(b.index, ElementwiseExpr(torch.reciprocal, (b.pending,)))
        op = {
            "add": "add",
            "iadd": "add",
            "sub": "add",
            "isub": "add",
            "mul": "mul",
            "imul": "mul",
            "multiply": "mul",
            "truediv": "mul",
            "itruediv": "mul",
            "div": "mul",
        }.get(name)
        if op is None:
            raise self.reader.rejection(node, f"`{name}` of two values is not among the engine's steps")
        ai, bi = torch.broadcast_tensors(self.reader.materialised(a).index, self.reader.materialised(b).index)
        (x, lane), (y, other) = self.reader.register(Rows(ai)), self.reader.register(Rows(bi))
        if not torch.equal(lane.order, other.order):
            raise IrregularColumns
        return self.reader.elementwise(op, ai.shape, lane, x=x, y=y)

    def elementwise_with_vector(self, node: fx.Node, name: str, x: Rows, y: Tensor, *, swapped: bool = False) -> Rows:
        op = "add_vector" if name in ("add", "iadd", "sub") else None
        op = "mul_vector" if name in ("mul", "imul", "multiply", "truediv", "div") else op
        if op is None or (swapped and name in ("sub", "truediv", "div")):
            raise self.reader.rejection(node, f"`{name}` with a constant tensor is not among the engine's steps")
        y = -y.float() if name == "sub" else 1 / y.float() if name in ("truediv", "div") else y.float()
        index, values = torch.broadcast_tensors(self.reader.materialised(x).index, y.detach())
        register, lane = self.reader.register(Rows(index))
        rows = values.reshape(-1)[lane.order].view(self.reader.plan.layout.tokens, -1)
        if not torch.equal(rows, rows[:1].expand_as(rows)):
            raise IrregularColumns
        vector = self.reader.plan.vector_entry(node.name, rows[0])
        return self.reader.elementwise(op, index.shape, lane, x=register, vector=vector)

    def _functional_linear(self, node: fx.Node, x: Any, weight: Any, bias: Any = None) -> Rows:
        if not (isinstance(x, Rows) and isinstance(weight, Tensor) and weight.dim() == 2):
            raise self.reader.rejection(node, "`linear` with a computed weight is not among the engine's steps")
        linear = linears.Linear((weight.shape[0], weight.shape[1]), bias, weight=weight.detach())
        return self.reader.lower_linear(node, x, node.name, linear)


def _zeros(like: Rows, *shape: Any) -> Rows:
    """Nothing yet, of a shape or that of another value."""
    flat = shape[0] if shape and isinstance(shape[0], tuple | list) else shape
    return Rows(torch.full(tuple(flat) or tuple(like.index.shape), -1))


def _defer(node: fx.Node, name: str, before: ElementwiseExpr | None, options: Any, named: Any) -> ElementwiseExpr:
    """An elementwise function of what is made before it."""
    if name == "rsqrt":
        return ElementwiseExpr(torch.reciprocal, (ElementwiseExpr(torch.sqrt, (before,), node),), node)
    function = calls.UNARY[name]
    options_kw = {key: value for key, value in named.items() if key != "inplace"}
    return ElementwiseExpr(lambda x: function(x, *options, **options_kw), (before,), node)

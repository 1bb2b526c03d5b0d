"""Calls that a graph holds, by what they do to numbers of tokens."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ...ir.graphs import name_of

# Change only where numbers lie: run on element numbers as they are.
MOVES = frozenset(
    {
        "view",
        "reshape",
        "transpose",
        "permute",
        "chunk",
        "split",
        "getitem",
        "unflatten",
        "flatten",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "narrow",
        "select",
        "unbind",
        "swapaxes",
        "movedim",
        "repeat_interleave",
        "repeat",
        "contiguous",
        "clone",
        "view_as",
        "reshape_as",
        "tensor_split",
        "index_select",
    }
)
JOINS = frozenset({"cat", "concat", "concatenate", "stack"})
SIZE_CALLS = frozenset({"size", "dim", "numel", "getattr"})
SAME = frozenset({"to", "float", "bfloat16", "half", "double", "type_as", "detach", "contiguous", "dropout", "type"})
UNARY: dict[str, Callable[..., Any]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "reciprocal": torch.reciprocal,
    "rsqrt": torch.rsqrt,
    "square": torch.square,
    "sqrt": torch.sqrt,
    "neg": torch.neg,
    "erf": torch.erf,
    "softplus": F.softplus,
    "abs": torch.abs,
    "clamp": torch.clamp,
    "clip": torch.clamp,
}
BINARY: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "div": operator.truediv,
    "multiply": operator.mul,
    "pow": operator.pow,
    "iadd": operator.add,
    "imul": operator.mul,
    "isub": operator.sub,
    "itruediv": operator.truediv,
    "rsub": lambda a, b: b - a,
    "gt": operator.gt,
    "ge": operator.ge,
    "lt": operator.lt,
    "le": operator.le,
    "logical_and": torch.logical_and,
}


def operation(node: fx.Node) -> str:
    """Operation of a call, one name for its function, method and operator. A method in place keeps its `_`."""
    return name_of(node) if node.op == "call_method" else name_of(node).strip("_")


def apply_to_indices(node: fx.Node, args: Any, kwargs: Any) -> Tensor | tuple[Tensor, ...]:
    """Run a call on element numbers. They may lie otherwise in memory than what they stand for: no view of that."""
    if node.op == "call_method":
        name = "reshape" if node.target == "view" and not isinstance(args[1], torch.dtype) else str(node.target)
        return getattr(args[0], name)(*args[1:], **kwargs)
    function: Any = node.target
    return function(*args, **kwargs)

"""Calls that a graph holds, by what they do to numbers of tokens."""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ...ir.graphs import target_name

# Change only where numbers lie: run on element numbers as they are.
MOVES = frozenset(
    """
    view reshape transpose permute chunk split getitem unflatten flatten squeeze unsqueeze expand
    expand_as narrow select unbind swapaxes movedim repeat_interleave repeat contiguous clone view_as
    reshape_as tensor_split index_select
    """.split()
)
JOINS = frozenset({"cat", "concat", "concatenate", "stack"})
SIZE_CALLS = frozenset({"size", "dim", "numel", "getattr"})
SAME = frozenset({"to", "float", "bfloat16", "half", "double", "type_as", "detach", "contiguous", "dropout", "type"})
UNARY: dict[str, Callable[..., Any]] = {
    name: getattr(torch, name)
    for name in """
        tanh sigmoid relu exp expm1 log log1p reciprocal rsqrt square sqrt neg erf abs clamp
    """.split()
} | {"silu": F.silu, "gelu": F.gelu, "softplus": F.softplus, "clip": torch.clamp}
BINARY: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "pow", "gt", "ge", "lt", "le")},
    **{f"i{name}": getattr(operator, name) for name in ("add", "mul", "sub", "truediv")},
    "div": operator.truediv,
    "multiply": operator.mul,
    "rsub": lambda a, b: b - a,
    "logical_and": torch.logical_and,
}


def operation_name(node: fx.Node) -> str:
    """Operation of a call, one name for its function, method and operator. A method in place keeps its `_`."""
    return target_name(node) if node.op == "call_method" else target_name(node).strip("_")


def run_on_element_numbers(node: fx.Node, args: Any, kwargs: Any) -> Tensor | tuple[Tensor, ...]:
    """Run a call on element numbers. They may lie otherwise in memory than what they stand for: no view of that."""
    if node.op == "call_method":
        name = "reshape" if node.target == "view" and not isinstance(args[1], torch.dtype) else str(node.target)
        return getattr(args[0], name)(*args[1:], **kwargs)
    function: Any = node.target
    return function(*args, **kwargs)

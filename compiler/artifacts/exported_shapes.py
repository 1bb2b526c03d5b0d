"""Shapes and types of all that a stored program computes, found by fake tensors before its operators run.

Some of torch's kernels trust their callers and read behind inputs whose sizes do not fit. Fake tensors go through the
checks of an operator without memory: the graph is run over them once with the sizes that it was written for, and again
with those of each call that has others.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._pytree import tree_flatten_spec
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from ..core.json_errors import first_line
from ..core.safe_read import Unlisted

aten = torch.ops.aten
_ENUMS = {"ScalarType": torch.dtype, "Layout": torch.layout, "MemoryFormat": torch.memory_format}
_MAX_SIGNATURES = 4096


@contextmanager
def quiet_fake_tensor_mode() -> Iterator[None]:
    """Fake tensors alone, without the pages that torch logs of a call that does not fit."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with FakeTensorMode(allow_non_fake_inputs=False, shape_env=ShapeEnv()), torch.no_grad():
            yield
    finally:
        log.setLevel(level)


def check_module(module: fx.GraphModule) -> None:
    """Run a program over the sizes that it was written for. Raises Unlisted where an operator refuses what it is given,
    or where the program states another shape or type than there is."""
    with quiet_fake_tensor_mode():
        values = [
            with_sizes_as_numbers(node.meta.get("val")) for node in module.graph.nodes if node.op == "placeholder"
        ]
        _Shapes(module, checks_declared=True).run(*values, enable_io_processing=False)


def check_shapes_on_call(module: fx.GraphModule, make_error: Callable[[Unlisted], Exception]) -> None:
    """Have a program check the sizes of each call before it computes; `make_error` makes what is raised."""
    known: set[Any] = set()

    def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves = tree_flatten_spec((list(args), kwargs), module._in_spec)
        signature = tuple((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in leaves)
        if signature in known:
            return
        try:
            with quiet_fake_tensor_mode():
                values = [with_sizes_as_numbers(leaf) for leaf in leaves]
                _Shapes(module, checks_declared=False).run(*values, enable_io_processing=False)
        except Unlisted as error:
            raise make_error(error) from error
        if len(known) < _MAX_SIGNATURES:
            known.add(signature)

    module.register_forward_pre_hook(check, with_kwargs=True)


class _Shapes(fx.Interpreter):
    """A run of a graph over fake tensors.

    checks_declared   whether results are held against what the program says of them
    """

    def __init__(self, module: fx.GraphModule, checks_declared: bool):
        super().__init__(module)
        self.checks_declared = checks_declared

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except (Unlisted, MemoryError):
            raise
        except Exception as error:  # operators refuse what they are given by errors of many kinds
            raise Unlisted(f"a call of {n.target} that does not fit: {first_line(error)}") from error
        if self.checks_declared and n.op == "call_function" and "val" in n.meta:
            _check_declared_shapes(n, value)
        return value

    def fetch_attr(self, target: str) -> Any:
        return with_sizes_as_numbers(super().fetch_attr(target))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> None:
        """torch's guards, which are not read."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return call_on_fake_tensors(target, args, kwargs)


def call_on_fake_tensors(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Result of an operator on fake tensors. Raises Unlisted, or whatever the operator raises of what does not fit."""
    if isinstance(target, torch._ops.OpOverload):
        _check_enum_arguments(target, args, kwargs)
        if target is aten.scaled_dot_product_attention.default:
            _check_attention(*args, **kwargs)
    return target(*args, **kwargs)


def _check_enum_arguments(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Types, layouts and formats are those of torch: it takes any number for one, and reads tables by it."""
    schema = target._schema.arguments
    values = [*zip(schema, args, strict=False), *((a, kwargs[a.name]) for a in schema if a.name in kwargs)]
    for argument, value in values:
        kind = next((kind for name, kind in _ENUMS.items() if name in str(argument.real_type)), None)
        if kind is not None and not (value is None or isinstance(value, kind)):
            raise Unlisted(f"a call of {target} with {value!r} as `{argument.name}`")


def _check_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> None:
    """torch's kernel for CPUs reads as many values as there are keys."""
    if key.shape[:-1] != value.shape[:-1]:
        raise Unlisted(f"an attention with keys {list(key.shape)} and values {list(value.shape)}")


def with_sizes_as_numbers(value: Any) -> Any:
    """A fake tensor of a tensor's sizes, those that are symbols being what they were when it was written."""
    if not isinstance(value, Tensor):
        return _number_of_symbol(value)
    sizes, strides = ([_number_of_symbol(n) for n in numbers] for numbers in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)


def _number_of_symbol(value: Any) -> Any:
    if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value
    if not value.node.has_hint():
        raise Unlisted("a size that has no number")
    return value.node.hint


def _check_declared_shapes(node: fx.Node, value: Any) -> None:
    stated, actual = pytree.tree_leaves(node.meta["val"]), pytree.tree_leaves(value)
    if len(stated) != len(actual) or not all(map(_shapes_agree, stated, actual)):
        raise Unlisted(f"another shape or type of {node.name} than {node.target} gives")


def _shapes_agree(declared: Any, actual: Any) -> bool:
    if isinstance(declared, Tensor) != isinstance(actual, Tensor):
        return False
    if not isinstance(declared, Tensor):
        return True  # a number follows from shapes, which are compared
    if declared.dtype != actual.dtype or declared.dim() != actual.dim():
        return False
    return all(_sizes_agree(a, b) for a, b in zip(declared.shape, actual.shape, strict=True))


def _sizes_agree(declared: Any, actual: Any) -> bool:
    """Whether two sizes agree; one that follows from what is in a tensor agrees with any."""
    symbolic = [n for n in (declared, actual) if isinstance(n, torch.SymInt) and not n.node.has_hint()]
    return bool(symbolic) or _number_of_symbol(declared) == _number_of_symbol(actual)

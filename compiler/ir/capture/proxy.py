"""The value that flows through a module while its forward is traced.

Each `Value` stands for a node of the graph and holds the concrete result of that node, so that Python control
flow over shapes, types and configs simply runs, while everything computed from the inputs is recorded.
"""

import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from transformers.cache_utils import Cache, EncoderDecoderCache

from ..layers import leaves

if TYPE_CHECKING:
    from .trace import Tracer

_COMPARISONS = ("eq", "ne", "lt", "gt", "le", "ge")
_SYMBOLIC = ("shape", "device")  # properties that stay reads of the running value
_HALVES = ("is_updated", "self_attention_cache", "cross_attention_cache")
_TENSOR_PROPERTIES = ("T", "mT", "H", "mH", "data", "real", "imag")


class Value(fx.Proxy):
    """A node and its concrete value (`value`): a tensor, size, int, tuple, device or cache."""

    tracer: "Tracer"

    def __init__(self, node: fx.Node, tracer: Any, value: Any):
        super().__init__(node, tracer)
        self.value = value
        self.known: dict[Any, Any] = {}  # reads already in the graph: shape, items

    def __repr__(self) -> str:
        return f"Value({self.node.name})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        value = self.value
        if isinstance(value, torch.Tensor) and name in _SYMBOLIC + _TENSOR_PROPERTIES:
            return self.read(name)
        if isinstance(value, EncoderDecoderCache) and name in _HALVES:
            return UncachedFlags() if name == "is_updated" else CacheHalf(self, crossed=name == "cross_attention_cache")
        member = getattr(value, name)  # an AttributeError here is what the running model would raise
        if isinstance(value, Cache) and callable(member):
            return self.tracer.traced_cache_method(self, name)
        return Method(self, name) if callable(member) else member

    def read(self, name: str) -> Any:
        """The property `name` as a node, made once: sizes don't change under a value's feet."""
        if name not in self.known:
            self.known[name] = self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return self.known[name]

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(self.value, tuple) or not isinstance(index, int):
            return self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})
        index = operator.index(index)
        if index not in self.known:
            self.known[index] = self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})
        return self.known[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(len(self.value))])

    def __len__(self) -> int:
        return len(self.value)

    def __contains__(self, item: Any) -> bool:
        return self.tracer.to_concrete_values(item) in self.plain()

    def __bool__(self) -> bool:
        return bool(self.plain())

    def __int__(self) -> int:
        return int(self.plain())

    def __index__(self) -> int:
        return operator.index(self.plain())

    def __float__(self) -> float:
        return float(self.plain())

    def plain(self) -> Any:
        """The held value for Python to decide by: sizes and settings may, numbers in a tensor may not."""
        if isinstance(self.value, torch.Tensor):
            self.tracer.refuse_reading_numbers()
        return self.value

    def __deepcopy__(self, memo: dict[int, Any]) -> "Value":
        return self

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        tracer = (
            _first_traced_value(args).tracer
            if _first_traced_value(args) is not None
            else _first_traced_value(kwargs).tracer
        )
        if torch.overrides.is_tensor_method_or_property(function):
            return tracer.create_proxy("call_method", function.__name__, args, kwargs)
        return tracer.create_proxy("call_function", function, args, kwargs)


def _first_traced_value(tree: Any) -> "Value | None":
    if isinstance(tree, Value):
        return tree
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, (tuple, list)):
        return next((value for value in map(_first_traced_value, tree) if value is not None), None)
    return None


def _define_comparison(name: str) -> None:
    compare = getattr(operator, name)

    def answer(self: Value, other: Any) -> Any:
        if isinstance(self.value, torch.Tensor) or isinstance(getattr(other, "value", None), torch.Tensor):
            return self.tracer.create_proxy("call_function", compare, (self, other), {})
        return compare(self.value, self.tracer.to_concrete_values(other))

    setattr(Value, f"__{name}__", answer)


for _name in _COMPARISONS:
    _define_comparison(_name)


class CacheHalf:
    """One of the two caches of a decoder behind an encoder: its own, or of what the encoder gave."""

    def __init__(self, owner: Value, crossed: bool):
        self.owner, self.crossed = owner, crossed

    def update(self, k: Any, v: Any, layer_idx: Any, *_: Any, **__: Any) -> Any:
        return (leaves.cross_update if self.crossed else leaves.cache_update)(self.owner, k, v, layer_idx)

    def get_seq_length(self, *args: Any) -> Any:
        assert not self.crossed, "how long what the encoder gave is, is read off its states"
        return leaves.cache_length(self.owner, *args)


class UncachedFlags(dict[Any, Any]):
    """Cache flags that report to a trace that no layer has cached the encoder's output, so that it records how it is
    made."""

    def get(self, key: Any, default: Any = None) -> Any:
        return False

    def __setitem__(self, key: Any, value: Any) -> None:
        """`leaves.cross_update` does it when the graph runs."""


class Method:
    """A method of a held value, not called yet."""

    def __init__(self, owner: Value, name: str):
        self.owner = owner
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.owner.tracer.create_proxy("call_method", self.name, (self.owner, *args), kwargs)

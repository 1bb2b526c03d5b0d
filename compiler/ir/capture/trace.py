"""The symbolic tracer: runs a module on concrete values and records what is computed from its inputs.

Python control flow over shapes, configs and attributes is evaluated, not recorded; sizes and devices stay
symbolic, so batch and length are free in the graph. See `leaves` for what stays whole.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.proxy import TracerBase
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from ..graphs import has_side_effects, plain_shape_and_dtype
from ..layers import leaves
from ..surgery import dict_attributes
from ..traced_integers import LayerIndex, TracedInt, with_traced_integers
from .patches import patch_for_tracing
from .proxy import Method, Value
from .unchanged import unchanged_operand

_PLAIN = (type(None), bool, str, torch.dtype, torch.layout, torch.memory_format)
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)
_SCALARS = (*_PLAIN, int, float, complex, torch.device, type(...))
_ADDS = (operator.add, operator.iadd, torch.add)
_TO_PYTHON = ("item", "tolist")
_RESULTS = (torch.Tensor, *_SCALARS, tuple, list, dict, Cache, nn.Module, PreTrainedConfig)


class Uncapturable(Exception):
    """The forward does something that a graph can't say."""


@dataclass(frozen=True)
class Trace:
    graph: fx.Graph
    of_this_layer: bool  # something was decided by the layer's own number: other layers need their own trace


class Tracer(TracerBase):
    """One trace of one root. `on` is false while a leaf executes."""

    def __init__(
        self,
        root: nn.Module,
        model_module: str,
        opaque: frozenset[str],
        inline: bool,
        optional: frozenset[str] = frozenset(),
    ):
        self.root = root
        self.model_module = model_module
        self.opaque = opaque  # paths that are leaves because tracing through them failed
        self.optional = optional  # placeholders that are None in other calls
        self.inline = inline  # whether to see inside modules that keep a state in the cache
        self.graph = fx.Graph()
        self.paths = {module: path for path, module in root.named_modules()}
        self.objects = _tensor_and_config_paths(self.paths)  # id of tensor or config -> path
        self.reads: dict[str, Value] = {}  # path -> its get_attr, made once
        self.stack: list[nn.Module] = [root]
        self.failed: str | None = None  # innermost module in which an exception passed
        self.paused = 0
        self.index_used = False  # whether Python decided or reckoned by a layer's own number

    @property
    def on(self) -> bool:
        return not self.paused

    @contextmanager
    def off(self) -> Iterator[None]:
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    # -- values ----------------------------------------------------------------------------------------------

    def to_concrete_values(self, tree: Any) -> Any:
        """The concrete values in a tree of arguments."""
        if isinstance(tree, Value):
            return tree.value
        if isinstance(tree, TracedInt):
            return int(tree)
        if isinstance(tree, LayerIndex):
            return tree.value
        if isinstance(tree, slice):
            return slice(
                self.to_concrete_values(tree.start),
                self.to_concrete_values(tree.stop),
                self.to_concrete_values(tree.step),
            )
        if type(tree) in (tuple, list, torch.Size):
            return (list if type(tree) is list else tuple)(map(self.to_concrete_values, tree))
        if type(tree) is dict:
            return {key: self.to_concrete_values(value) for key, value in tree.items()}
        return tree

    def run_untraced(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = self.to_concrete_values(args), self.to_concrete_values(kwargs)
        with self.off():
            if kind == "call_function":
                return target(*args, **kwargs)
            if kind == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            assert kind == "call_module", f"a {kind} is not executed"
            return self.root.get_submodule(target)(*args, **kwargs)

    def refuse_reading_numbers(self) -> None:
        """Say that Python is about to decide by the numbers in a tensor, which other inputs would change."""
        if not self.inline:
            raise Uncapturable("what runs depends on the numbers in a tensor")

    # -- recording -------------------------------------------------------------------------------------------

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        """Execute a call and record it; plain results (None, bool, str, dtype) come back as they are."""
        if kind == "call_method" and target in _TO_PYTHON:
            self.refuse_reading_numbers()
        if target in _DROPOUTS and type(kwargs.get("training")) is bool:
            # `training=self.training` is read when the graph runs: a bound layer can still be trained.
            path = ".".join(part for part in (self.paths[self.stack[-1]], "training") if part)
            kwargs = {**kwargs, "training": self.attribute(path, kwargs["training"])}
        if target in _ADDS and len(args) == 2 and any(map(self.may_be_none, args)):
            target, args = leaves.masked, args if self.may_be_none(args[1]) else args[::-1]
        unchanged = unchanged_operand(target, args, kwargs)
        if unchanged is not None:
            return unchanged
        value = self.run_untraced(kind, target, args, kwargs)
        if isinstance(value, _PLAIN) and target is not operator.setitem:
            return value
        return self.record_node(kind, target, args, kwargs, value)

    def may_be_none(self, value: Any) -> bool:
        """Whether a value is an argument that isn't given in some calls."""
        return isinstance(value, Value) and value.node.op == "placeholder" and value.node.target in self.optional

    def record_node(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Value:
        if not isinstance(value, _RESULTS):
            raise Uncapturable(f"`{getattr(target, '__name__', target)}` gives a {type(value).__name__}")
        ints: list[tuple[str, int, str]] = []
        node = self.graph.create_node(
            kind, target, self.to_graph_argument(args, "args", ints), self.to_graph_argument(kwargs, "kwargs", ints)
        )
        node.meta["scope"] = tuple(self.paths.get(module, "") for module in self.stack[1:])
        node.meta["shape"], node.meta["dtype"] = plain_shape_and_dtype(value)
        if ints:
            node.meta["ints"] = tuple(ints)
        role = self.node_role(kind, target)
        if role:
            node.meta["role"] = role
        return Value(node, self, value)

    def node_role(self, kind: str, target: Any) -> str | None:
        if kind == "call_module":
            module = self.root.get_submodule(target)
            if target in self.opaque:
                return "ssm_scan" if leaves.is_state_space(module) else "opaque"
            return leaves.module_role(module)
        if kind == "call_function":
            return getattr(target, "role", None) or (
                leaves.function_role(target.__name__)
                if not target.__module__.startswith(("torch", "_op")) and hasattr(target, "__code__")
                else None
            )
        return None

    def to_graph_argument(self, tree: Any, path: str, ints: list[tuple[str, int, str]]) -> Any:
        """An argument as the graph holds it. `path` says where it stands, for the provenance of literals."""
        if isinstance(tree, Value):
            return tree.node
        if isinstance(tree, LayerIndex):
            return self.attribute(tree.source, tree.value).node
        if isinstance(tree, TracedInt):
            ints.append((path, int(tree), tree.source))
            return int(tree)
        if isinstance(tree, (nn.Module, torch.Tensor, PreTrainedConfig)):
            return self.attribute(self.path_of(tree), tree).node
        if isinstance(tree, slice):
            return slice(
                *(
                    self.to_graph_argument(getattr(tree, part), f"{path}.{part}", ints)
                    for part in ("start", "stop", "step")
                )
            )
        if isinstance(tree, (tuple, list)):
            kind = list if isinstance(tree, list) else tuple
            return kind(self.to_graph_argument(item, f"{path}.{i}", ints) for i, item in enumerate(tree))
        if isinstance(tree, dict):
            return {key: self.to_graph_argument(value, f"{path}.{key}", ints) for key, value in tree.items()}
        if isinstance(tree, _SCALARS):
            return tree
        raise Uncapturable(f"a {type(tree).__name__} is passed to an operation")

    def path_of(self, member: Any) -> str:
        path = self.paths.get(member) if isinstance(member, nn.Module) else self.objects.get(id(member))
        if path is None:
            raise Uncapturable(f"a {type(member).__name__} that belongs to no module is used")
        return path

    def attribute(self, path: str, value: Any) -> Value:
        """The read of a module, tensor, config or layer index of the tree."""
        if path not in self.reads:
            self.reads[path] = self.record_node("get_attr", path, (), {}, value)
        return self.reads[path]

    # -- calls -----------------------------------------------------------------------------------------------

    def call_module(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Callable[..., Any]
    ) -> Any:
        path = self.paths.get(module)
        if path is not None and (path in self.opaque or leaves.is_leaf(module, self.model_module)):
            return self.create_proxy("call_module", path, args, kwargs)
        self.stack.append(module)
        try:
            return forward(module, *args, **kwargs)
        except Exception:
            if self.failed is None:
                self.failed = path
            raise
        finally:
            self.stack.pop()

    def traced_cache_method(self, cache: Value, name: str) -> Callable[..., Any]:
        if name == "update":
            # Whatever else is passed is for caches that this library release doesn't have.
            return lambda k, v, layer_idx, *_, **__: leaves.cache_update(cache, k, v, layer_idx)
        if name == "get_seq_length":
            return lambda *args: leaves.cache_length(cache, *args)
        if not self.inline:
            # Whether it has a state decides which way the forward goes: a graph would know one way only.
            raise Uncapturable(f"a state of its own is kept in the cache (`{name}`)")
        return Method(cache, name)


def trace_forward(
    root: nn.Module,
    arguments: Mapping[str, Any],
    constant_arguments: Mapping[str, Any],
    *,
    model_module: str,
    opaque_paths: frozenset[str] = frozenset(),
    inline_stateful_modules: bool = False,
    optional_arguments: frozenset[str] = frozenset(),
    select_result: Callable[[Any], Any] = lambda result: result,
) -> Trace:
    """The graph of `root.forward(**arguments, **statics)` with the arguments as placeholders.

    Tensors, tuples and caches in `arguments` may have other sizes when the graph runs; `constant_arguments` are baked.
    `inline_stateful_modules` looks inside modules that keep a state in the cache: for analysis, not for decoding.
    `optional_arguments` may be None when the graph runs: what they are added to stays as it is then.
    `select_result` chooses what the graph returns. An exception leaves with `effc_path`, the innermost module that it
    passed.
    """
    tracer = Tracer(root, model_module, opaque_paths, inline_stateful_modules, optional_arguments)
    leaves.push_tracer(tracer)
    tables = _dicts_and_copies(root)
    try:
        with torch.no_grad(), patch_for_tracing(tracer), with_traced_integers(tracer.paths, tracer):
            values = {name: _placeholder(tracer, name, value) for name, value in arguments.items()}
            result = select_result(root.forward(**values, **constant_arguments))
            tracer.graph.output(tracer.to_graph_argument(result, "args", []))
        tracer.graph.eliminate_dead_code(has_side_effects)
    except Exception as error:
        vars(error)["effc_path"] = tracer.failed or ""
        raise
    finally:
        leaves.pop_tracer(tracer)
        _replace_traced_attributes_by_values(root)
        for table, before in tables:
            table.clear()
            table.update(before)
    return Trace(tracer.graph, tracer.index_used)


def _replace_traced_attributes_by_values(root: nn.Module) -> None:
    """Restore attributes that a forward stored in its module, such as a table moved to a device."""
    for module in root.modules():
        for members in (vars(module), module._buffers):
            members.update({name: value.value for name, value in members.items() if type(value) is Value})


def _dicts_and_copies(root: nn.Module) -> list[tuple[dict, dict]]:
    """Dicts of modules and what is in them: another trace would find values of this one there."""
    return [(table, dict(table)) for module in root.modules() for table in dict_attributes(module)]


def _placeholder(tracer: Tracer, name: str, value: Any) -> Value:
    node = tracer.graph.placeholder(name, default_value=None)
    node.meta["scope"] = ()
    node.meta["shape"], node.meta["dtype"] = plain_shape_and_dtype(value)
    return Value(node, tracer, value)


def _tensor_and_config_paths(module_paths: dict[nn.Module, str]) -> dict[int, str]:
    paths_by_id: dict[int, str] = {}
    for module, path in module_paths.items():
        prefix = f"{path}." if path else ""
        members = {**vars(module), **module._parameters, **module._buffers}
        for name, member in members.items():
            if isinstance(member, (torch.Tensor, PreTrainedConfig)):
                paths_by_id.setdefault(id(member), prefix + name)
    return paths_by_id

"""One repeated layer of a model as a graph that the layer runs in place of its class's own forward."""

import hashlib
import inspect
import linecache
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ...dsl.syntax.diagnostics import Fault

unsupported_argument = Fault(
    "unsupported-argument",
    "A layer that runs its graph is given an argument which the graph was made without.",
    exit="environment",
)

# Arguments that say how a caller wants results, not what a layer computes: any value may be passed.
_FREE = frozenset({"use_cache", "output_hidden_states", "return_dict", "num_items_in_batch", "logits_to_keep"})


_CACHES = ("cache", "layer_past", "past_key_values", "past_key_value")


_functions: "weakref.WeakKeyDictionary[fx.Graph, Callable[..., Any]]" = weakref.WeakKeyDictionary()


@dataclass
class Unit:
    """One layer and its graph.

    path          the layer in the model, "model.layers.7"; "" for the whole model
    graph         targets are paths below the layer; `node.meta` holds plain data only: `scope` (modules being
                  run, outermost first), `shape`, `dtype`, `ints` ((place, value, source expression), ...)
                  and, on leaves, `role`
    placeholders  names of the forward's arguments that stay free; any of them may be None when it runs
    statics       arguments that were baked, with their values
    key           sha256 of the generated code; layers that are equal in shapes, too, share one graph object
    edited        the graph differs from the layer's own forward, so it must be bound to take effect
    optional      placeholders that are None for rows without padding
    """

    path: str
    graph: fx.Graph
    placeholders: tuple[str, ...]
    statics: dict[str, Any]
    key: str
    edited: bool = False
    optional: frozenset[str] = frozenset()

    def module(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.path)

    def function(self) -> Callable[..., Any]:
        """`f(layer, *placeholders)`, compiled once per graph."""
        if self.graph not in _functions:
            _functions[self.graph] = compile_to_forward(self.graph, self.key)
        return _functions[self.graph]

    def install_graph_forward(self, model: nn.Module) -> None:
        """Let the layer run its graph: class, hooks, recording and gradient checkpointing stay."""
        layer = self.module(model)
        names = positional_argument_names(type(layer))
        run = make_forward(self.function(), names, self.placeholders, self.statics, self.path)
        vars(run)["__signature__"] = inspect.signature(inspect.unwrap(type(layer).forward))  # what exporters ask for
        layer.forward = types.MethodType(run, layer)

    def restore_class_forward(self, model: nn.Module) -> None:
        """Let the layer run its class's own forward again."""
        vars(self.module(model)).pop("forward", None)


def positional_argument_names(layer_class: type[nn.Module]) -> tuple[str, ...]:
    """Names of the parameters that a layer's forward takes by position, without `self`."""
    signature = inspect.signature(inspect.unwrap(layer_class.forward))
    return tuple(name for name, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)[1:]


def compile_to_forward(graph: fx.Graph, key: str) -> Callable[..., Any]:
    """The graph as a Python function whose first argument is the module that its targets start from."""
    code = graph.python_code("self")
    file = f"<effc {key[:12]}>"
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(True), file)
    names = dict(code.globals)
    exec(compile(code.src, file, "exec"), names)
    return names["forward"]


def graph_code_hash(graph: fx.Graph) -> str:
    """sha256 of the generated code, which is equal for equal layers."""
    return hashlib.sha256(graph.python_code("self").src.encode()).hexdigest()


def make_forward(
    function: Callable[..., Any],
    parameter_names: tuple[str, ...],
    placeholders: tuple[str, ...],
    constants: Mapping[str, Any],
    path: str,
) -> Callable[..., Any]:
    """A `forward` that hands its arguments to `function`.

    Raises Reject (unsupported-argument) when an argument that the graph has baked comes with another value.
    """

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Of equal length: older torch compiles `strict=False` as if it were true.
        arguments = dict(zip(parameter_names[: len(args)], args[: len(parameter_names)], strict=True)) | kwargs
        values = [arguments.pop(name, None) for name in placeholders]
        for name, value in arguments.items():
            if not _equals_baked_constant(name, value, constants):
                raise unsupported_argument(
                    f"{path} was compiled without `{name}`, so it can't follow it",
                    help="call the model without it, or with rows without padding where the model adds it itself",
                ).rejection()
        return function(self, *values)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (
            isinstance(self, GradientCheckpointingLayer)
            and self.gradient_checkpointing
            and self.training
            and torch.is_grad_enabled()
        ):
            return run(self, *args, **kwargs)
        # As the class's own wrapper does: a replay in the backward pass would write to the cache twice.
        kwargs |= {name: None for name in _CACHES if name in kwargs}
        checkpointed: Any = self._gradient_checkpointing_func  # transformers sets it where it turns this on
        return checkpointed(partial(run, self, **kwargs), *args)

    vars(forward)["effc_names"] = function.__globals__  # what a later trace exchanges leaf functions in
    return forward


def _equals_baked_constant(name: str, value: Any, constants: Mapping[str, Any]) -> bool:
    baked, value = _as_tuple(constants.get(name)), _as_tuple(value)
    return name in _FREE or value is None or value is False or (type(value) is type(baked) and value == baked)


def _as_tuple(value: Any) -> Any:
    """Sizes are tuples, and lists where a graph was stored."""
    return tuple(map(_as_tuple, value)) if isinstance(value, (list, tuple)) else value

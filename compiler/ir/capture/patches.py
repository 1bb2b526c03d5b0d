"""Patches of torch, transformers and model source while a trace runs."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution
from transformers.modeling_utils import AttentionInterface

from ..layers import leaves
from ..layers.hub_kernels import unwrap_kernel_module
from .proxy import Value

# Torch functions without a tensor argument: an int proxy would not reach `__torch_function__`.
_FACTORIES = tuple(
    """
    arange zeros ones full empty tensor as_tensor scalar_tensor eye linspace rand randn randint cat
    stack einsum full_like zeros_like ones_like empty_like
    """.split()
)
_MISSING = object()


@contextmanager
def patch_for_tracing(tracer: Any) -> Iterator[None]:
    """Calls of modules, reads of parameters, factories, attention and leaf functions report to `tracer`."""
    with patch_module_calls(), ExitStack() as undo:
        for name in _FACTORIES:
            _patch_attribute(undo, torch, name, _recording_wrapper(tracer, getattr(torch, name)))
        _patch_attribute(undo, torch, "is_tensor", lambda x: isinstance(_concrete_value(x), torch.Tensor))
        _patch_attribute(undo, Distribution, "_validate_args", False)  # it asks what numbers are, of constants
        _patch_attention(tracer, undo)
        for source in modeling_modules(tracer.paths, tracer.model_module):
            _patch_source_file(tracer, source, undo)
        for module in tracer.paths:
            _patch_bound_graph(tracer, module, undo)
        yield


def modeling_modules(layers: Any, model_module: str) -> list[Any]:
    """The Python modules in which the classes of these nn modules, and their bases, are written."""
    names = {
        base.__module__: None
        for module in layers
        for base in type(module).__mro__
        if leaves.is_model_source(base.__module__, model_module)
    }
    return [sys.modules[name] for name in names if name in sys.modules]


def _patch_attribute(exit_stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    before = vars(owner).get(name, _MISSING)
    exit_stack.callback(delattr, owner, name) if before is _MISSING else exit_stack.callback(
        setattr, owner, name, before
    )
    setattr(owner, name, value)


@contextmanager
def patch_module_calls() -> Iterator[None]:
    """Calls of modules and reads of parameters report to the tracer that is on, where one is.

    Whoever traces many times puts this around all of it: a class whose `__call__` is exchanged hands that on to each
    of its subclasses, and of nn.Module there are thousands.
    """
    call, read = nn.Module.__call__, nn.Module.__getattr__
    if hasattr(call, "__effc_original__"):  # inside of another
        yield
        return

    def traced_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tracer = leaves.active_tracer()
        return call(module, *args, **kwargs) if tracer is None else tracer.call_module(module, args, kwargs, call)

    def traced_read(module: nn.Module, name: str) -> Any:
        value, tracer = read(module, name), leaves.active_tracer()
        if tracer is None or not isinstance(value, torch.Tensor) or module not in tracer.paths:
            return value
        path = tracer.paths[module]
        return tracer.attribute(f"{path}.{name}" if path else name, value)

    vars(traced_call)["__effc_original__"] = call
    with ExitStack() as undo:
        _patch_attribute(undo, nn.Module, "__call__", traced_call)
        _patch_attribute(undo, nn.Module, "__getattr__", traced_read)
        yield


def _recording_wrapper(tracer: Any, function: Callable[..., Any]) -> Any:
    @functools.wraps(function)
    def record(*args: Any, **kwargs: Any) -> Any:
        if not tracer.on:
            return function(*args, **kwargs)
        return tracer.create_proxy("call_function", function, args, kwargs)

    vars(record)["__effc_original__"] = function
    return record


def _patch_attention(tracer: Any, exit_stack: ExitStack) -> None:
    find = AttentionInterface.get_interface

    def traced_find(self: Any, implementation: str, default: Any) -> Any:
        return _call_attention_leaf if tracer.on else find(self, implementation, default)

    _patch_attribute(exit_stack, AttentionInterface, "get_interface", traced_find)


def _call_attention_leaf(
    module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any = None, **options: Any
) -> Any:
    """The leaf, under the library's names for what it is given.

    Not to be causal where a mask is there, as Moonshine says, is left out: without one the library decides as it does.
    """
    if attention_mask is not None and options.get("is_causal") is False and getattr(module, "is_causal", False):
        del options["is_causal"]
    return leaves.attention(module, query, key, value, attention_mask, **options)


def _patch_source_file(tracer: Any, source: Any, exit_stack: ExitStack) -> None:
    # Proxies must not claim to be tensors to torch's C++ (it would read them as such), only to model source.
    _patch_attribute(exit_stack, source, "isinstance", lambda x, kind: isinstance(_concrete_value(x), kind))
    for name, value in list(vars(source).items()):
        function = unwrap_kernel_module(value)
        if name == leaves.ROTARY:
            _patch_attribute(exit_stack, source, name, _recording_rotary_wrapper(tracer, function))
        elif leaves.is_library_leaf(function) and not name.startswith("__"):
            _patch_attribute(exit_stack, source, name, _recording_wrapper(tracer, function))
        elif function is not value:
            _patch_attribute(exit_stack, source, name, function)


def _patch_bound_graph(tracer: Any, module: nn.Module, exit_stack: ExitStack) -> None:
    """A layer that runs a graph already calls leaf functions by the names in that graph's code."""
    names = getattr(vars(module).get("forward"), "effc_names", {})
    for name, value in list(names.items()):
        if leaves.is_library_leaf(value) and not hasattr(value, "__effc_original__"):
            exit_stack.callback(names.__setitem__, name, value)
            names[name] = _recording_wrapper(tracer, value)


def _recording_rotary_wrapper(tracer: Any, function: Callable[..., Any]) -> Any:
    @functools.wraps(function)
    def record(*args: Any, **kwargs: Any) -> Any:
        if not tracer.on:
            return function(*args, **kwargs)
        return leaves.rotary(tracer.stack[-1], *args, **kwargs)

    vars(record)["__effc_original__"] = function
    return record


def _concrete_value(x: Any) -> Any:
    return x.value if type(x) is Value else x

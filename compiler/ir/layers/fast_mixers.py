"""State-space mixers on effc's kernels instead of what transformers falls back to on a CPU.

The library's functions for scans and convolutions are the leaf functions of `leaves`; a mixer finds them by
name in its source file. A quickened mixer runs its own forward with those names leading to kernels: nothing of
transformers is changed, only this module's `forward`, and a trace sees the library's functions as ever. What a
kernel can't take (another device or type, an odd activation, packed sequences) goes to the library's function.
"""

import functools
import re
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ....kernels import levels
from . import leaves
from .hub_kernels import unwrap_kernel_module

MARK = "cpu_scan"  # the attribute by which edits say that a module was quickened
DECAY = "A_log"
_NORM = re.compile(r"\w*RMSNorm(Gated)?")


def use_mixer_kernels(model: nn.Module, *, only_marked: bool = False) -> list[str]:
    """Let the state-space mixers of a model run on kernels; their paths, none where no kernels are compiled.

    only_marked   only those that carry `MARK`
    """
    if levels.load_library() is None:
        return []
    paths = [path for path in kernel_mixer_paths(model) if not only_marked or is_marked_for_kernels(model, path)]
    for path in paths:
        module = model.get_submodule(path)
        names = _global_names_of_bound_graph(module)
        if names is None:
            module.forward = types.MethodType(_forward, module)
        else:
            names |= {
                name: causal_conv_on_kernel() for name, function in names.items() if function is leaves.causal_conv
            }
    if paths:
        _bind_norms_and_projections(model)
    return paths


def _bind_norms_and_projections(model: nn.Module) -> None:
    """Kernels for norms, and for the projections of mixers without a scan, whose decoding no fused step takes."""
    for module in model.modules():
        if _is_norm(module) and "forward" not in vars(module):
            module.forward = types.MethodType(_norm, module)
        if _lost_its_scan(module):
            for child in module.children():
                if _is_linear(child) and "forward" not in vars(child):
                    child.forward = types.MethodType(_projection, child)


def remove_mixer_kernels(model: nn.Module) -> None:
    """Undo `use_mixer_kernels`."""
    for module in model.modules():
        if runs_on_kernels(module):
            del module.forward
        names = _global_names_of_bound_graph(module) or {}
        names |= {name: leaves.causal_conv for name, function in names.items() if function is causal_conv_on_kernel()}


def is_marked_for_kernels(model: nn.Module, path: str) -> bool:
    """Whether edits say that a module was quickened."""
    return bool(vars(model.get_submodule(path)).get(MARK))


@contextmanager
def without_mixer_kernels(model: nn.Module) -> Iterator[bool]:
    """Run a model as plain transformers does, within a block; whether that is another way than before."""
    bound = [(module, module.forward) for module in model.modules() if runs_on_kernels(module)]
    graphs = [
        (names, dict(names))
        for names in map(_global_names_of_bound_graph, model.modules())
        if names and causal_conv_on_kernel() in names.values()
    ]
    remove_mixer_kernels(model)
    try:
        yield bool(bound or graphs)
    finally:
        for module, forward in bound:
            module.forward = forward
        for names, before in graphs:
            names |= before


def runs_on_kernels(module: nn.Module) -> bool:
    """Whether a module runs its class's forward, over kernels."""
    return getattr(vars(module).get("forward"), "__func__", None) in (_forward, _norm, _projection)


def kernel_mixer_paths(model: nn.Module) -> list[str]:
    """Modules that scan or convolve along the sequence by functions that have a kernel."""
    return [path for path, module in model.named_modules() if _can_use_kernels(module)]


def scan_paths(model: nn.Module) -> list[str]:
    """Paths of the mixers that scan."""
    return [
        path
        for path, module in model.named_modules()
        if _global_names_of_bound_graph(module) is None and _has_scan(module)
    ]


def _has_scan(module: nn.Module) -> bool:
    """Whether a mixer scans, and has not lost its scan: then a layer's graph goes through what is left of it."""
    return _is_scan_class(type(module)) and DECAY in module._parameters


def _lost_its_scan(module: nn.Module) -> bool:
    return _is_scan_class(type(module)) and DECAY not in module._parameters


def _is_scan_class(mixer_class: type) -> bool:
    return any("conv" not in name for name in _kernel_functions_called(mixer_class))


def _can_use_kernels(module: nn.Module) -> bool:
    names = _global_names_of_bound_graph(module)
    if names is not None:
        return any(
            value in (leaves.causal_conv, causal_conv_on_kernel())
            for value in names.values()
            if isinstance(value, types.FunctionType)
        )
    kind: type = type(module)
    called = _kernel_functions_called(kind)
    return _has_scan(module) or (bool(called) and all("conv" in name for name in called))


def _global_names_of_bound_graph(module: nn.Module) -> dict[str, Any] | None:
    """The names in a bound graph's code; None for a module that runs its class's forward."""
    return getattr(vars(module).get("forward"), "effc_names", None)


@functools.cache
def _kernel_functions_called(mixer_class: type[nn.Module]) -> frozenset[str]:
    """Names of functions with a kernel that a class's forward calls, or a function of its source file that it calls."""
    from . import functions

    if not mixer_class.__module__.startswith("transformers."):
        return frozenset()
    return frozenset(_source_functions_called(mixer_class.forward) & functions.QUICK.keys())


def _source_functions_called(forward: Callable[..., Any]) -> set[str]:
    """Names of the functions of its source file that a forward calls, those that they call among them."""
    inner = _innermost_wrapped_function(forward)
    source: dict[str, Any] = getattr(inner, "__globals__", {})
    names: set[str] = set()
    pending = [inner]
    while pending:
        code = getattr(pending.pop(), "__code__", None)
        for name in set(code.co_names if code else ()) - names:
            function = _innermost_wrapped_function(unwrap_kernel_module(source.get(name)))
            if isinstance(function, types.FunctionType) and function.__globals__ is source:
                names.add(name)
                pending.append(function)
    return names


# -- running -------------------------------------------------------------------------------------------------


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if leaves.is_tracing() or torch.compiler.is_compiling():
        return type(self).forward(self, *args, **kwargs)
    kind: type = type(self)
    return _mixers()(_forward_with_kernels(kind), self, args, kwargs)


def _norm(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if leaves.is_tracing() or torch.compiler.is_compiling():
        return type(self).forward(self, *args, **kwargs)
    return _norms()(self, args, kwargs)


def _projection(self: nn.Linear, x: Any) -> Any:
    if leaves.is_tracing() or torch.compiler.is_compiling():
        return type(self).forward(self, x)
    return _projections()(self, x)


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear


def _is_norm(module: nn.Module) -> bool:
    kind = type(module)
    return _NORM.fullmatch(kind.__name__) is not None and kind.__module__.startswith("transformers.")


@functools.cache
def _mixers() -> Callable[..., Any]:
    from . import mixer  # not before it is needed: its kernels register themselves with torch

    return mixer.run_mixer


@functools.cache
def _norms() -> Callable[..., Any]:
    from . import norms

    return norms.run_norm


@functools.cache
def _projections() -> Callable[..., Any]:
    from . import decode_steps

    return decode_steps.projection_forward


@functools.cache
def _forward_with_kernels(mixer_class: type[nn.Module]) -> Callable[..., Any]:
    """The class's forward with the names of scans and convolutions leading to kernels."""
    from . import functions

    inner = _innermost_wrapped_function(mixer_class.forward)
    names = dict(inner.__globals__)
    cached: type = mixer_class
    on_kernels = _kernel_functions_called(cached)
    for name in _source_functions_called(mixer_class.forward) - on_kernels:
        called = unwrap_kernel_module(names[name])
        names[name] = _with_global_names(called, _innermost_wrapped_function(called), names)
    for name in on_kernels:
        names[name] = functions.wrap_with_kernel(name, unwrap_kernel_module(names[name]))
    return _with_global_names(mixer_class.forward, inner, names)


def _innermost_wrapped_function(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _with_global_names(function: Any, inner: Any, global_names: dict[str, Any]) -> Any:
    """A copy of a decorated function whose innermost one has other global names."""
    if function is inner:
        return _copy_function(inner, global_names, inner.__closure__)
    wrapped = function.__wrapped__
    new = _with_global_names(wrapped, inner, global_names)
    closure = function.__closure__ or ()
    cells = tuple(types.CellType(new) if cell.cell_contents is wrapped else cell for cell in closure)
    assert any(cell.cell_contents is new for cell in cells), f"{function.__qualname__} hides what it wraps"
    return _copy_function(function, function.__globals__, cells)


def _copy_function(function: Any, global_names: dict[str, Any], closure: Any) -> Any:
    copy = types.FunctionType(function.__code__, global_names, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@functools.cache
def causal_conv_on_kernel() -> Callable[..., Any]:
    """The leaf function `causal_conv` over the kernel; a trace records the leaf."""
    from . import functions

    @functools.wraps(leaves.causal_conv)
    def causal_conv(*args: Any, **kwargs: Any) -> Any:
        if leaves.is_tracing() or torch.compiler.is_compiling():
            return leaves.causal_conv(*args, **kwargs)
        return functions.causal_conv_leaf_on_kernel(*args, **kwargs)

    vars(causal_conv)["__effc_original__"] = leaves.causal_conv
    return causal_conv

"""When are two layers the same program? When nothing that a trace can read differs.

A signature holds every attribute, shape and type below a layer and the form of its arguments. Values that
can't be compared by content are compared by identity, so that doubt only costs a second trace.
"""

import functools
import types
from collections.abc import Hashable, MutableMapping
from typing import Any

import torch
from torch import nn

from ..graphs import plain_shape_and_dtype
from ..traced_integers import LAYER_INDICES

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Bookkeeping of nn.Module that a forward doesn't read; parameters, buffers and modules are compared by shape.
_SKIPPED = frozenset(vars(nn.Module())) - {"training"} | LAYER_INDICES | {"_is_hf_initialized"}


def module_signature(module: nn.Module) -> Hashable:
    """Equal for layers whose forwards do the same, up to weights and the layer's index."""
    return tuple(
        (path, type(part), _attributes_key(part), _tensors_key(part), _hooks_key(part))
        for path, part in module.named_modules()
    )


def call_signature(arguments: dict[str, Any]) -> Hashable:
    """The form of a call: shapes and types of tensors, values of everything else."""
    return tuple((name, _shape_dtype_or_content_key(value)) for name, value in sorted(arguments.items()))


def _attributes_key(module: nn.Module) -> Hashable:
    return tuple(sorted((name, _content_key(value)) for name, value in vars(module).items() if name not in _SKIPPED))


def _tensors_key(module: nn.Module) -> Hashable:
    owned = {**module._parameters, **module._buffers}
    return tuple((name, None if t is None else (tuple(t.shape), t.dtype, t.device)) for name, t in owned.items())


def _hooks_key(module: nn.Module) -> Hashable:
    return tuple(_function_key(hook) for kind in _HOOKS for hook in getattr(module, kind).values())


def _function_key(function: Any) -> Hashable:
    code = getattr(function, "__code__", None)
    if code is None:
        return id(function)
    return id(code), tuple(_content_key(cell.cell_contents) for cell in function.__closure__ or ())


def _content_key(value: Any) -> Hashable:
    if isinstance(value, _PLAIN):
        return type(value).__name__, str(value)
    if isinstance(value, (tuple, list)):
        return type(value).__name__, str([_content_key(item) for item in value])
    if isinstance(value, (set, frozenset)):
        return type(value).__name__, str(sorted(str(_content_key(item)) for item in value))
    if isinstance(value, dict):
        return "dict", str([(str(key), _content_key(item)) for key, item in value.items()])
    if isinstance(value, functools.partial):
        return "partial", str((_function_key(value.func), _content_key(value.args), _content_key(value.keywords)))
    if isinstance(value, types.MethodType):
        return "method", str(_content_key(value.__func__))
    if isinstance(value, types.FunctionType):
        return "function", str((_function_key(value), _content_key(value.__defaults__)))
    return "object", str(id(value))


def _shape_dtype_or_content_key(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return plain_shape_and_dtype(value)
    if isinstance(value, (tuple, list)):
        return tuple(map(_shape_dtype_or_content_key, value))
    if isinstance(value, MutableMapping):
        return tuple((str(key), _shape_dtype_or_content_key(item)) for key, item in value.items())
    kind = plain_shape_and_dtype(value)[1]
    return kind if kind == "cache" else _content_key(value)

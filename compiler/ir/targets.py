"""Whether what a stored graph calls and reads is there in a layer, and of a kind that a call may have.

A stored graph may come from anybody. Paths are followed through the tables of modules, parameters and buffers alone:
nothing is looked up by Python's own attribute search, so that a path can't reach a method or a property. All is
decided before anything is called.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from transformers import PreTrainedConfig

from ..core.safe_read import Unlisted, require_or_unlisted
from .layers import leaves
from .operations import is_whole_library_function
from .surgery import module_at, split_parent_and_name

_TEXT = re.compile(r"[\w ,.>()\-]{0,64}")  # `einsum`'s equations are the longest
_MAX_LAYERS = 4096  # a cache makes a slot for every number below the one it is asked for
_CACHE = ("cache_update", "cross_update", "cache_length", "packed_attention", "causal_conv")


def check_graph_targets(graph: fx.Graph, layer: nn.Module, model_package: str) -> None:
    """Raises Unlisted where a node calls or reads what a layer doesn't have, or hands it to what doesn't take it.

    model_package   the package of the model's own source, which decides what is a leaf
    """
    for node in graph.nodes:
        if node.op == "call_module":
            _refuse_non_module_call(node, layer, model_package)
        elif node.op == "get_attr":
            _refuse_misused_read(node, layer)
        elif node.op == "call_function":
            _check_arguments_of_leaf_call(node)
        elif node.op == "call_method" and node.args[0].op == "get_attr":
            require_or_unlisted(
                _is_tensor(layer, node.args[0].target), f"the method {node.target} of {node.args[0].target}"
            )
        if node.op in ("call_function", "call_method", "call_module"):
            fx.node.map_aggregate((node.args, node.kwargs), _checked_argument)


def value_at_layer_path(layer: nn.Module, path: str) -> Any:
    """The module, tensor, number or config at a path below a layer. Raises Unlisted where there is no such thing."""
    owner, name = split_parent_and_name(path)
    try:
        module = module_at(layer, owner)
    except LookupError as error:
        raise Unlisted(f"the path {path}, which the layer doesn't have") from error
    for table in (module._modules, module._parameters, module._buffers):
        if table.get(name) is not None:
            return table[name]
    value = vars(module).get(name)
    require_or_unlisted(
        isinstance(value, (bool, int, float, PreTrainedConfig)),
        f"the path {path}, which is no module, tensor or number",
    )
    return value


def _is_tensor(layer: nn.Module, path: str) -> bool:
    return isinstance(value_at_layer_path(layer, path), torch.Tensor)


def _refuse_non_module_call(node: fx.Node, layer: nn.Module, family: str) -> None:
    module = value_at_layer_path(layer, str(node.target))
    runs = (
        isinstance(module, nn.Module)
        and not leaves.is_container(module)
        and (leaves.is_leaf(module, family) or next(module.parameters(), None) is not None)
    )
    require_or_unlisted(runs, f"a call of {node.target}, which is no module that computes")


def _refuse_misused_read(node: fx.Node, layer: nn.Module) -> None:
    """Modules and configs may be read only for the functions that take one; tensors and numbers for any."""
    value = value_at_layer_path(layer, str(node.target))
    if isinstance(value, nn.Module):
        misuses = [user for user in node.users if not _is_module_argument_of(user, node)]
    elif isinstance(value, PreTrainedConfig):
        misuses = [user for user in node.users if not is_whole_library_function(user.target)]
    else:
        return
    require_or_unlisted(not misuses, f"a read of {node.target}, which is no tensor and no number")


def _is_module_argument_of(user: fx.Node, node: fx.Node) -> bool:
    """Whether a call is of one of our functions whose first argument is a module, and that is what it is given."""
    functions = (
        user.op == "call_function"
        and leaves.LEAF_FUNCTIONS.get(getattr(user.target, "__name__", "")) is user.target
        and ("module" in _parameters(user.target))
    )
    return (
        functions
        and user.all_input_nodes.count(node) == 1
        and bool(user.args)
        and user.args[0] is node
        and not any(a is node for a in (*user.args[1:], *user.kwargs.values()))
    )


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def _check_arguments_of_leaf_call(node: fx.Node) -> None:
    name = getattr(node.target, "__name__", "")
    if leaves.LEAF_FUNCTIONS.get(name) is not node.target:
        return
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
    except TypeError as error:
        raise Unlisted(f"a call of leaf.{name} with other arguments: {error}") from error
    module = bound.get("module")
    if "module" in _parameters(node.target):
        require_or_unlisted(
            isinstance(module, fx.Node) and module.op == "get_attr", f"leaf.{name} of what is no module"
        )
    if name in _CACHE:
        cache, index = bound.get("cache"), bound.get("layer_idx", 0)
        require_or_unlisted(
            cache is None or (isinstance(cache, fx.Node) and cache.op == "placeholder"),
            f"leaf.{name} with a cache that is no argument of the layer",
        )
        require_or_unlisted(
            (isinstance(index, fx.Node) and index.op == "get_attr")
            or (type(index) is int and 0 <= index < _MAX_LAYERS),
            f"leaf.{name} with an odd slot",
        )


def _checked_argument(value: Any) -> Any:
    short = not isinstance(value, str) or _TEXT.fullmatch(value) is not None
    require_or_unlisted(short, f"the text {str(value)[:40]!r} as an argument")
    return value

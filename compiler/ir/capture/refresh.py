"""Keeping an edited graph true to its layer: literals follow their attributes, shapes are read again.

A unit whose data flow was edited can't be traced again (its own forward calls modules that are gone).
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from ..graphs import plain_shape_and_dtype
from ..surgery import attribute_at
from ..traced_integers import evaluate_expression


def copy_if_integers_changed(graph: fx.Graph, layer: nn.Module) -> fx.Graph | None:
    """A copy of the graph with its sourced literals evaluated anew; None if none has changed."""
    fresh = copy.deepcopy(graph)
    changed = False
    for node in fresh.nodes:
        current = tuple(
            (path, evaluate_expression(source, _make_layer_or_config_int_reader(layer, node)), source)
            for path, _, source in node.meta.get("ints", ())
        )
        if current != node.meta.get("ints", ()):
            changed = True
            node.meta["ints"] = current
            for path, value, _ in current:
                set_nested_argument(node, path.split("."), value)
    return fresh if changed else None


def _make_layer_or_config_int_reader(layer: nn.Module, node: fx.Node) -> Callable[[str], int]:
    def read(path: str) -> int:
        if path.startswith("config."):
            scope = node.meta["scope"][-1] if node.meta["scope"] else ""
            return int(attribute_at(layer.get_submodule(scope), path))
        return int(attribute_at(layer, path))

    return read


def set_nested_argument(node: fx.Node, path: list[str], value: int) -> None:
    if path[0] == "args":
        node.args = _replace_nested(node.args, path[1:], value)
    else:
        node.kwargs = _replace_nested(node.kwargs, path[1:], value)


def _replace_nested(tree: Any, path: list[str], value: int) -> Any:
    if not path:
        return value
    head, tail = path[0], path[1:]
    if isinstance(tree, slice):
        parts = {name: getattr(tree, name) for name in ("start", "stop", "step")}
        parts[head] = _replace_nested(parts[head], tail, value)
        return slice(*parts.values())
    if isinstance(tree, dict):
        return {key: _replace_nested(item, tail, value) if key == head else item for key, item in tree.items()}
    items = [_replace_nested(item, tail, value) if str(i) == head else item for i, item in enumerate(tree)]
    return items if isinstance(tree, list) else tuple(items)


class _MetadataRecorder(fx.Interpreter):
    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if node.op != "output":
            node.meta["shape"], node.meta["dtype"] = plain_shape_and_dtype(value)
        return value


def refresh_shapes_and_dtypes(graph: fx.Graph, layer: nn.Module, example_arguments: tuple[Any, ...]) -> None:
    """Run the graph once and write the shapes and types of all values into `node.meta`."""
    with torch.no_grad():
        _MetadataRecorder(layer, graph=graph).run(*example_arguments)

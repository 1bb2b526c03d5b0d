"""Registers of the hidden states that layers hand on, at which interventions act."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .layout import Layout
from .values import Rows


def layer_output_registers(
    nodes: Sequence[fx.Node], values: Mapping[fx.Node, Any], paths: Collection[str], layout: Layout
) -> dict[str, int]:
    """Register of each layer's result, by its path: where rows of numbers leave it at one node alone, and lie in a
    register of their own.

    nodes    of the flat graph; `values` are what a reader made of them
    paths    of layers
    """
    inside = {node: _enclosing_layers(node, paths) for node in nodes}
    results: dict[str, list[fx.Node]] = {}
    for node in nodes:
        users = [inside.get(user, frozenset()) for user in node.users]
        for path in inside[node]:
            if any(path not in around for around in users):
                results.setdefault(path, []).append(node)
    registers = {
        path: _single_rows_register([values.get(node) for node in left], layout) for path, left in results.items()
    }
    return {path: register for path, register in registers.items() if register is not None}


def _enclosing_layers(node: fx.Node, paths: Collection[str]) -> frozenset[str]:
    """Paths of the layers that a node is computed in, by the modules that were called."""
    around = set()
    for scope in node.meta.get("scope", ()):
        parts = scope.split(".")
        around |= {".".join(parts[: n + 1]) for n in range(len(parts))}
    return frozenset(around.intersection(paths))


def _single_rows_register(results: Sequence[Any], layout: Layout) -> int | None:
    rows = [value for value in results if isinstance(value, Rows)]
    if len(rows) != 1 or any(isinstance(value, (tuple, list, Mapping)) for value in results):
        return None
    (value,) = rows
    if value.pending is not None or value.index.dim() != 3:
        return None
    flat = value.index.reshape(-1)
    if int(flat.min()) < 0:
        return None
    register, _ = layout.register_column_of_element(int(flat[0]))
    return register if torch.equal(flat, layout.rows(register).reshape(-1)) else None

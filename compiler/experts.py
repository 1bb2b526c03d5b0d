"""Leaf modules opened for analysis: what experts and routers do inside, as a graph.

They stay whole in graphs that run: which experts are called depends on numbers. Their library's batched form computes
the same for all tokens at once, without asking which, and that one can be traced.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers.integrations.moe import ExpertsInterface

from .program import argument_names
from .trace import trace

_BATCHED = "batched_mm"


def opened(module: nn.Module, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> fx.Graph | None:
    """The graph of a leaf module, its placeholders named as its arguments; None where it can't be traced.

    node          the call, whose own arguments say what types are passed
    args, kwargs  tensors of the shapes that are passed
    """
    names = argument_names(type(module))
    shapes = {**dict(zip(names, args, strict=False)), **kwargs}
    nodes = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    given = {name: torch.zeros(x.shape, dtype=getattr(torch, nodes[name].meta["dtype"]), device=device)
             for name, x in shapes.items() if isinstance(x, Tensor)}
    find = ExpertsInterface.get_interface
    ExpertsInterface.get_interface = lambda self, name, default: self[_BATCHED]
    try:
        statics = {name: x for name, x in shapes.items() if name not in given}
        graph = trace(module, given, statics, family=type(module).__module__, inline=True).graph
    except Exception:      # a forward may raise anything; then the module is taken as a whole, and that is said
        return None
    finally:
        ExpertsInterface.get_interface = find
    for inner in graph.nodes:
        inner.meta.pop("ints", None)      # their sources start at the module; a literal that must follow is refused
    return graph

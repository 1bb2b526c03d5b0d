"""Experts and routers: opened for analysis, and which of their tensors have a part for each expert.

They stay whole in graphs that run: which experts are called depends on numbers. Their library's batched form computes
the same for all tokens at once, without asking which, and that one can be traced.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers.integrations.moe import ExpertsInterface

from ..dsl.skeleton import Group, Member
from .program import argument_names
from .residual import common
from .trace import trace

_BATCHED = "batched_mm"
_EACH = ((0, 1),)          # one index of the first axis for each expert


class Unrouted(Exception):
    """Experts are called and what chooses them is not understood."""


def expert_groups(graph: fx.Graph, root: nn.Module) -> Iterator[Group | tuple[str, str]]:
    """Whole experts with their rows of the router, paths below the unit; or a module and why it has none."""
    for node in graph.nodes:
        if node.op == "call_module" and node.meta.get("role") == "experts":
            try:
                yield _experts(node, root)
            except Unrouted as why:
                yield node.target, f"whole experts can't go: {why}"


def _experts(node: fx.Node, root: nn.Module) -> Group:
    packed = dict(root.get_submodule(node.target).named_parameters())
    counts = {p.shape[0] for p in packed.values()}
    if len(counts) != 1:
        raise Unrouted("their weights are not packed into one tensor each")
    count = counts.pop()
    index = next((x for x in node.all_input_nodes if "int" in str(x.meta.get("dtype"))), None)
    router = _router(index, root, count)
    rows = {f"{router}.{name}": p for name, p in root.get_submodule(router).named_parameters() if p.shape[0] == count}
    members = [Member(name, 0, _EACH) for name in (*rows, *(f"{node.target}.{name}" for name in packed))]
    site = common([node.target, router])
    attributes = tuple(
        (".".join(p for p in (site, below) if p), name, 1.0)
        for below, module in root.get_submodule(site).named_modules() for name, value in vars(module).items()
        if type(value) is int and value == count and "expert" in name)
    return Group(site, "experts", count, tuple(members), attributes, 0, len(packed))


def _router(index: fx.Node | None, root: nn.Module, count: int) -> str:
    """The module that makes a score for each expert, behind the numbers of those that were chosen."""
    waiting, seen = [index] if index is not None else [], set()
    while waiting:
        node = waiting.pop(0)
        if node.op == "call_module":
            module = root.get_submodule(node.target)
            if any(p.shape[0] == count for p in module.parameters()):
                if any(b.dim() and b.shape[0] == count for b in module.buffers()):
                    raise Unrouted(f"{node.target} keeps a buffer with an entry for each")
                return node.target
        waiting += [x for x in node.all_input_nodes if x not in seen]
        seen.update(node.all_input_nodes)
    raise Unrouted("no module makes a score for each of them")


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module is a torch layer whose subclass computes in a way of its own: convolutions that pad."""
    bases = [base for base in type(module).__mro__ if "forward" in vars(base)]
    return not bases[0].__module__.startswith("torch.") and any(
        base.__module__.startswith("torch.nn.modules.") and base is not nn.Module for base in bases[1:])


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

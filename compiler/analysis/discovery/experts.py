"""Experts and routers: opened for analysis, and which of their tensors have a part for each expert.

They stay whole in graphs that run: which experts are called depends on numbers. Their library's batched form computes
the same for all tokens at once, without asking which, and that one can be traced.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from transformers.integrations.moe import ExpertsInterface

from ....dsl.checker.skeleton import Group, Member, Skeleton
from ...ir.capture.trace import trace_forward
from ...ir.layers.leaves import module_role
from ...ir.surgery import attribute_at
from ...ir.unit import positional_argument_names
from .labelling import Labelling
from .residual import common_ancestor_module

_BATCHED = "batched_mm"
_EACH = ((0, 1),)  # one index of the first axis for each expert
EXPERTS_FIXED = "whole experts can't go"
_GROUPED_BYTES = 16  # torch multiplies packed experts in groups, whose rows start at multiples of so many bytes


class UnknownRouter(Exception):
    """Experts are called and what chooses them is not understood."""


def expert_groups(graph: fx.Graph, root: nn.Module, labelling: Labelling) -> Iterator[Group | tuple[str, str]]:
    """Whole experts with their rows of the router, paths below the unit; or a module and why it has none."""
    by_target: list[tuple[str, Group]] = []
    for node in graph.nodes:
        if node.op == "call_module" and node.meta.get("role") == "experts":
            try:
                by_target.append((node.target, _expert_group(node, root, labelling)))
            except UnknownRouter as error:
                yield node.target, f"{EXPERTS_FIXED}: {error}"
    routers = [group.members[0].tensor for _, group in by_target]
    for target, group in by_target:
        if routers.count(group.members[0].tensor) > 1:
            yield target, f"{EXPERTS_FIXED}: other modules are chosen by the same router"
        else:
            yield group


def _expert_group(node: fx.Node, root: nn.Module, labelling: Labelling) -> Group:
    path = str(node.target)
    packed = dict(root.get_submodule(path).named_parameters())
    counts = {p.shape[0] for p in packed.values()}
    if len(counts) != 1 or all(p.dim() < 3 for p in packed.values()):
        raise UnknownRouter("their weights are not packed into one tensor each")
    count = counts.pop()
    index = next((x for x in node.all_input_nodes if "int" in str(x.meta.get("dtype"))), None)
    router, read = _find_router_and_per_expert_attributes(index, root, count)
    rows = [
        f"{router}.{name}"
        for name, x in (*root.get_submodule(router).named_parameters(), *root.get_submodule(router).named_buffers())
        if _is_tensor_of_rows(x, count)
    ]
    members = [Member(name, 0, _EACH) for name in (*rows, *read, *(f"{node.target}.{name}" for name in packed))]
    per_block = _experts_per_group(labelling, f"{router}.", count)
    site = common_ancestor_module([path, router])
    attributes = tuple(
        (".".join(p for p in (site, inner) if p), name, 1.0)
        for inner, module in root.get_submodule(site).named_modules()
        for name, value in vars(module).items()
        if type(value) is int and value == count and "expert" in name
    )
    return Group(site, "experts", count, tuple(members), attributes, per_block if per_block < count else 0, len(packed))


def _find_router_and_per_expert_attributes(
    index: fx.Node | None, root: nn.Module, num_experts: int
) -> tuple[str, list[str]]:
    """The module that makes a score for each expert, and what has an entry for each on the way from it to the numbers
    of those that were chosen."""
    waiting, visited = [index] if index is not None else [], set()
    read: list[str] = []
    while waiting:
        node = waiting.pop(0)
        path = str(node.target)
        if node.op == "call_module" and any(
            _is_tensor_of_rows(p, num_experts) for p in root.get_submodule(path).parameters()
        ):
            attributes = [str(x.target) for x in node.all_input_nodes if x.op == "get_attr"]
            return path, read + [x for x in attributes if _is_tensor_of_rows(attribute_at(root, x), num_experts)]
        if node.op == "get_attr" and _is_tensor_of_rows(attribute_at(root, path), num_experts):
            read.append(path)
        waiting += [x for x in node.all_input_nodes if x not in visited]
        visited.update(node.all_input_nodes)
    raise UnknownRouter("no module makes a score for each of them")


def _is_tensor_of_rows(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count


def _experts_per_group(labelling: Labelling, router_prefix: str, num_experts: int) -> int:
    """Number of consecutive experts that are compared with each other first, where they come in groups; else all."""
    rows = {
        r for c in labelling.claims if c.tensor.startswith(router_prefix) and not c.reads for r in c.labels.tolist()
    }
    return min(
        (
            size
            for labels, size in labelling.chosen
            if not rows.isdisjoint(labels.tolist()) and size > 1 and num_experts % size == 0
        ),
        default=num_experts,
    )


def with_width_multiple(group: Group, model: nn.Module) -> Group:
    """A group of the widths of packed experts says of how many channels the product of all experts at once takes
    multiples; one that has another width is not computed so."""
    multiple = 1
    for member in group.members if group.kind in ("channels", "width") and not group.per_block else ():
        size, step = sum(n for _, n in member.segments), grouped_matmul_width_step(model, member.tensor, member.axis)
        multiple = math.lcm(multiple, step // math.gcd(size, step))
    return replace(group, multiple=multiple) if multiple > 1 and group.count % multiple == 0 else group


def grouped_matmul_width_step(model: nn.Module, tensor: str, axis: int) -> int:
    """Step of the size of an axis of packed experts; 1 for all else."""
    owner, _, name = tensor.rpartition(".")
    module = model.get_submodule(owner)
    weight = dict(module.named_parameters(recurse=False)).get(name)
    if weight is None or weight.dim() != 3 or axis == 0 or module_role(module) != "experts":
        return 1
    return _GROUPED_BYTES // weight.element_size()


def expert_width_problems(skeleton: Skeleton, new_shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Packed experts of widths that the product of all of them doesn't take."""
    for group, m in ((g, m) for g in skeleton.groups if g.multiple > 1 for m in g.members if m.tensor in new_shapes):
        size, step = new_shapes[m.tensor][m.axis], group.multiple * sum(n for _, n in m.segments)
        if size % step:
            yield f"{m.tensor} would be {size} wide, and is computed in steps of {step}"


def _pass_keywords_by_position(function: Callable[..., Any]) -> Callable[..., Any]:
    """Classes of experts have names of their own for what the library's form is given in the same order."""
    return lambda module, *args, **kwargs: function(module, *args, *kwargs.values())


def overrides_forward_of_torch_layer(module: nn.Module) -> bool:
    """Whether a module is a torch layer whose subclass computes in a way of its own: convolutions that pad."""
    bases = [base for base in type(module).__mro__ if "forward" in vars(base)]
    return not bases[0].__module__.startswith("torch.") and any(
        base.__module__.startswith("torch.nn.modules.") and base is not nn.Module for base in bases[1:]
    )


class LeafTrace(NamedTuple):
    """`refusal` is "" where there is a graph."""

    graph: fx.Graph | None
    refusal: str


def trace_leaf_module(module: nn.Module, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LeafTrace:
    """The graph of a leaf module, its placeholders named as its arguments; or None, and why it can't be traced.

    node          the call, whose own arguments say what types are passed
    args, kwargs  tensors of the shapes that are passed
    """
    names = positional_argument_names(type(module))
    shapes = {**dict(zip(names, args, strict=False)), **kwargs}
    nodes = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    tensors = {
        name: torch.zeros(x.shape, dtype=getattr(torch, nodes[name].meta["dtype"]), device=device)
        for name, x in shapes.items()
        if isinstance(x, Tensor)
    }
    experts: Any = ExpertsInterface  # whose method is another one for a while
    find = experts.get_interface
    experts.get_interface = lambda self, name, default: _pass_keywords_by_position(self[_BATCHED])
    try:
        statics = {name: x for name, x in shapes.items() if name not in tensors}
        graph = trace_forward(
            module, tensors, statics, model_module=type(module).__module__, inline_stateful_modules=True
        ).graph
    except Exception as error:  # a forward may raise anything; then the module is taken as a whole
        return LeafTrace(None, f": {type(error).__name__}: {error}")
    finally:
        experts.get_interface = find
    for inner in graph.nodes:
        inner.meta.pop("ints", None)  # their sources start at the module; a literal that must follow is refused
    return LeafTrace(graph, "")

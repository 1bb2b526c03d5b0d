"""Liveness in a graph after an edit: dead code, also behind operations that write in place."""

import operator
from collections.abc import Iterator

import torch
from torch import fx

from .graphs import has_side_effects

_STATEFUL = ("cache_update", "ssm_scan", "ssm_conv")
_WRITERS = (operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv)
# What makes a new tensor whatever it is given. All else may hand on the memory of what it reads.
_NEW = frozenset(
    """
    add sub mul truediv pow neg matmul bmm baddbmm mm linear embedding softmax sum mean amax amin
    sigmoid tanh exp rsqrt silu gelu relu repeat repeat_interleave cat stack clone zeros ones full empty
    zeros_like ones_like full_like empty_like new_zeros new_ones new_empty new_full gather scatter
    index_select where masked_fill eq ne lt le gt ge
    """.split()
)
_NEW_ROLES = frozenset(("linear", "conv", "embedding", "norm", "experts"))
_NUMBERS = ("size", "dim", "numel")
# Kinds of values, as `graphs.describe` names them, that nobody writes into: all else, as a dict, is memory.
_PLAIN = (int, float, bool, complex, str, slice, type(...), type(None))
_OF_TENSORS = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_FIXED = frozenset(("size", *(kind.__name__ for kind in (*_PLAIN, *_OF_TENSORS))))


def mutates_first_operand(node: fx.Node) -> bool:
    """Whether a node changes its first operand."""
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    return node.op == "call_function" and node.target in _WRITERS


def mutating_users(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that change a node's value in place."""
    return (user for user in node.users if mutates_first_operand(user) and user.args and user.args[0] is node)


def eliminate_dead_code(graph: fx.Graph) -> None:
    """Erase what nothing needs any more: what only keeps a state of its own, or writes into what nobody reads.

    A write into memory that came from outside of the graph stays, and so does one into memory that may be read.
    """
    nodes = list(graph.nodes)
    memory = _alias_class_by_node(nodes)
    outside = {memory[n] for n in nodes if n.op in ("placeholder", "get_attr")}
    writers: dict[int, list[fx.Node]] = {}
    for node in filter(mutates_first_operand, nodes):
        writers.setdefault(memory[node], []).append(node)
    needed: set[fx.Node] = set()
    queue = [n for n in nodes if _is_live_unread(n) or (mutates_first_operand(n) and memory[n] in outside)]
    while queue:
        node = queue.pop()
        if node not in needed:
            needed.add(node)
            queue += node.all_input_nodes
            queue += writers.get(memory[node], ())
    for node in reversed(nodes):
        if node not in needed:
            graph.erase_node(node)


def bypass_addition(add: fx.Node, operand: fx.Node) -> None:
    """Make users of an addition read one operand. The addition stays, unread, until `eliminate_dead_code`."""
    add.replace_all_uses_with(operand)
    add.target = operator.add  # `iadd` would be a write into memory that is read


def _is_live_unread(node: fx.Node) -> bool:
    """Nodes that are live though no node reads them, except updates of a state whose branch is gone.

    A module or method that is handed the cache is live by itself where no node ever read its result. Where the nodes
    that read it are dead, its branch is gone, and the state that it keeps was for that branch.
    """
    if not has_side_effects(node) or mutates_first_operand(node) or node.meta.get("role") in _STATEFUL:
        return False
    return node.op not in ("call_method", "call_module") or not node.users


def _alias_class_by_node(nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """Nodes that may share memory have the same number."""
    number: dict[fx.Node, int] = {}
    members: dict[int, list[fx.Node]] = {}
    for index, node in enumerate(nodes):
        number[node], members[index] = index, [node]
        shared = (
            [_first_operand(node)]
            if mutates_first_operand(node)
            else []
            if _returns_new_memory(node)
            else node.all_input_nodes
        )
        for other in {number[x] for x in shared if not _is_value_without_memory(x)} - {number[node]}:
            mine = number[node]
            for member in members.pop(other):
                number[member] = mine
                members[mine].append(member)
    return number


def _first_operand(node: fx.Node) -> fx.Node:
    assert isinstance(node.args[0], fx.Node), f"{node.name} changes no value"
    return node.args[0]


def _returns_new_memory(node: fx.Node) -> bool:
    if node.op == "call_module":
        return node.meta.get("role") in _NEW_ROLES
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and (
        name in _NEW or name in _NUMBERS or _is_value_without_memory(node)
    )


def _is_value_without_memory(node: fx.Node) -> bool:
    """Whether a node's value is no memory: an integer, a size, a dtype, a module that is handed on."""
    if node.meta.get("shape") is not None or not isinstance(kind := node.meta.get("dtype"), str):
        return False
    return node.op == "get_attr" or kind in _FIXED

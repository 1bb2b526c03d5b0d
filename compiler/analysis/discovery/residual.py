"""Residual branches of a unit, found on its graph.

An add of two same-shape values is a residual add if one of them dominates the other: every path from the
entry of the stream to the branch's value passes the point where the stream was tapped. Names play no part.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from ...ir.graphs import target_name
from ...ir.layers.leaves import module_role
from ...ir.layers.linear import KernelLinear
from ...ir.liveness import mutating_users
from .labelling import PRODUCTS, tensors_in

ADDS = frozenset(("add", "iadd", "add_"))
KEEPS = frozenset(("to", "float", "type", "contiguous", "clone", "dropout"))  # still the same stream
SCALES = frozenset(("mul", "imul", "mul_", "truediv"))
SCANS = frozenset(("ssm_scan", "ssm_conv"))
WORK = frozenset(("linear", "conv", "experts", "router", "embedding", "module", "opaque"))


@dataclass(frozen=True)
class Term:
    """The summand of one branch: the nodes between the tap and `value`, an operand of the add `join`."""

    join: fx.Node
    value: fx.Node
    nodes: frozenset[fx.Node]
    role: str
    site: str  # below the unit; "" where the work lies in the unit itself
    modules: tuple[str, ...]  # below the unit, with parameters: called by no node outside of the branch


def find_branch_terms(graph: fx.Graph, root: nn.Module, entries: Sequence[fx.Node], values: Mapping) -> list[Term]:
    """The branches in the order in which they are added; `values`, of a labelling, tell data from sizes.

    entries   where data comes in: the residual stream, or all of a graph's inputs
    """
    above = immediate_dominators(entries, values)
    splits: list[tuple[fx.Node, fx.Node, frozenset[fx.Node]]] = []
    for node in graph.nodes:
        tap = find_residual_split(node, above, values)
        if tap is not None:
            value = next(x for x in _operands(node) if x is not tap[1])
            splits += _parallel_branch_terms(node, value, tap[0], above, values)
    inner = {join for join, _, _ in splits if any(join in nodes for _, _, nodes in splits)}
    outermost = [term for term in splits if term[0] not in inner]
    return [
        _make_term(root, graph, join, value, nodes, _without_shared_norm(nodes, value, outermost))
        for join, value, nodes in outermost
    ]


def immediate_dominators(entries: Sequence[fx.Node], values: Mapping) -> dict[fx.Node, fx.Node | None]:
    """The immediate dominator of every node that data reaches from `entries`; None: nothing but all of them."""
    above: dict[fx.Node, fx.Node | None] = dict.fromkeys(entries)
    depth: dict[fx.Node | None, int] = {None: -1, **dict.fromkeys(entries, 0)}
    node = entries[0].next
    while node.op != "root":
        inputs = [x for x in _inputs_and_earlier_writes(node) if x in above]
        if node not in above and inputs and has_labelled_value(node, values):
            low: fx.Node | None = inputs[0]
            for other in inputs[1:]:
                low = _common_dominator(low, other, above, depth)
            above[node], depth[node] = low, depth[low] + 1
        node = node.next
    return above


def _inputs_and_earlier_writes(node: fx.Node) -> Iterator[fx.Node]:
    """Sources of a node's value: what it reads, and what was written into that before."""
    for x in node.all_input_nodes:
        yield x
        for write in mutating_users(x):
            if write < node:
                yield from (y for y in write.all_input_nodes if y is not x)


def _common_dominator(
    a: fx.Node | None, b: fx.Node | None, immediate_dominators: Mapping, depth: Mapping
) -> fx.Node | None:
    while a is not b:
        if depth[a] >= depth[b]:
            a = immediate_dominators[a]
        else:
            b = immediate_dominators[b]
    return a


def has_labelled_value(node: fx.Node, values: Mapping) -> bool:
    return next(tensors_in(values.get(node)), None) is not None


def find_residual_split(
    node: fx.Node, immediate_dominators: Mapping, values: Mapping
) -> tuple[fx.Node, fx.Node] | None:
    """Tap of a residual add in the stream, and the operand that carries it; None for any other node."""
    if not _is_add(node, immediate_dominators, values):
        return None
    left, right = _operands(node)
    for stream, value in ((left, right), (right, left)):
        for tap in _candidate_splits(stream, value, immediate_dominators, values):
            if tap is not unwrap_identity(value) and _dominates(tap, value, immediate_dominators):
                return tap, stream
    return None


def _operands(add: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Of what `_is_add` says is one."""
    left, right = add.args
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node), f"{add.name} adds other things than two values"
    return left, right


def _candidate_splits(
    stream: fx.Node, value: fx.Node, immediate_dominators: Mapping, values: Mapping
) -> Iterator[fx.Node]:
    """Nodes at which a value may have left the stream: at itself, or, where that is a sum, at the sum's own tap beside
    it."""
    yield stream
    yield unwrap_identity(stream)
    yield unwrap_scaling(stream)
    earlier = find_residual_split(unwrap_identity(stream), immediate_dominators, values)
    if earlier is not None and unwrap_identity(stream) not in _nodes_between(earlier[0], value, immediate_dominators):
        yield earlier[0]


def _is_add(node: fx.Node, immediate_dominators: Mapping, values: Mapping) -> bool:
    if node not in immediate_dominators or target_name(node) not in ADDS or len(node.args) != 2:
        return False
    left, right = node.args
    if left not in immediate_dominators or right not in immediate_dominators:
        return False
    left, right = values[left], values[right]
    return isinstance(left, Tensor) and isinstance(right, Tensor) and left.shape == right.shape


def _dominates(split_node: fx.Node, node: fx.Node | None, immediate_dominators: Mapping) -> bool:
    while node is not None and node is not split_node:
        node = immediate_dominators[node]
    return node is split_node


def unwrap_identity(node: fx.Node) -> fx.Node:
    """The node behind casts, dropouts and modules that do nothing."""
    while (node.op in ("call_function", "call_method") and target_name(node) in KEEPS) or (
        node.op == "call_module" and node.meta.get("role") in ("dropout", "identity")
    ):
        behind = node.args[0]
        assert isinstance(behind, fx.Node), f"{node.name} keeps no value"
        node = behind
    return node


def unwrap_scaling(node: fx.Node) -> fx.Node:
    """The node behind products with numbers and with parameters: some models weigh stream and branch."""
    while target_name(node := unwrap_identity(node)) in SCALES and len(node.args) == 2:
        data = [x for x in node.args if isinstance(x, fx.Node) and x.op != "get_attr"]
        if len(data) != 1:
            break
        node = data[0]
    return node


def _parallel_branch_terms(
    join: fx.Node, value: fx.Node, split_node: fx.Node, immediate_dominators: Mapping, values: Mapping
) -> list:
    """Branches that run in parallel meet in an add of their own, in the same module as the residual add."""
    inner = unwrap_identity(value)
    if (
        _is_add(inner, immediate_dominators, values)
        and inner.meta.get("scope") == join.meta.get("scope")
        and find_residual_split(inner, immediate_dominators, values) is None
    ):
        return [
            part
            for x in _operands(inner)
            for part in _parallel_branch_terms(inner, x, split_node, immediate_dominators, values)
        ]
    inner_add = _input_of_output_projection(inner, immediate_dominators)
    if (
        inner_add is not None
        and _is_add(inner_add, immediate_dominators, values)
        and find_residual_split(inner_add, immediate_dominators, values) is None
    ):
        operand_nodes = [_nodes_between(split_node, x, immediate_dominators) for x in _operands(inner_add)]
        if {"attention", "ssm"} == {
            _branch_role(side - operand_nodes[1 - i], True) for i, side in enumerate(operand_nodes)
        }:
            return [(inner_add, x, side) for x, side in zip(_operands(inner_add), operand_nodes, strict=True)]
    return [(join, value, _nodes_between(split_node, value, immediate_dominators))]


def _input_of_output_projection(node: fx.Node, immediate_dominators: Mapping) -> fx.Node | None:
    """Input of a branch's last projection, norms and weighing skipped; None where there is none."""
    past_projection = False
    while (node := unwrap_scaling(node)).op == "call_module" and node.meta.get("role") in ("linear", "norm"):
        inputs = [x for x in node.all_input_nodes if x in immediate_dominators]
        if len(inputs) != 1:
            return None
        node, past_projection = inputs[0], True
    return node if past_projection else None


def _without_shared_norm(nodes: frozenset[fx.Node], value: fx.Node, terms: Sequence[tuple]) -> frozenset[fx.Node]:
    """A branch without what another one in parallel computes as well: both may begin with the same norm."""
    beside = [other for _, at, other in terms if at is not value and value not in other and at not in nodes]
    return nodes.difference(*beside)


def _nodes_between(split_node: fx.Node, value: fx.Node, immediate_dominators: Mapping) -> frozenset[fx.Node]:
    visited: set[fx.Node] = set()
    queue = [value]
    while queue:
        node = queue.pop()
        if node is not split_node and node in immediate_dominators and node not in visited:
            visited.add(node)
            queue += _inputs_and_earlier_writes(node)
    return frozenset(visited)


def _make_term(
    root: nn.Module,
    graph: fx.Graph,
    join: fx.Node,
    value: fx.Node,
    nodes: frozenset[fx.Node],
    exclusive: frozenset[fx.Node],
) -> Term:
    local = {path for n in exclusive for path in paths_of_modules_used(n, root)}
    foreign = {path for n in graph.nodes if n not in exclusive for path in paths_of_modules_used(n, root)}
    work = [path for path in local if _is_weighted_worker(root.get_submodule(path))]
    order = {path: i for i, (path, _) in enumerate(root.named_modules())}
    called = {n.target for n in exclusive if n.op == "call_module"}
    owned = {
        f"{path}.{inner}" if inner else path
        for path in local - foreign  # of what is one node, all below it
        for inner, part in root.get_submodule(path).named_modules()
        if (part._parameters or isinstance(part, KernelLinear)) and (path in called or not inner)
    }
    role = _branch_role(exclusive, bool(work))
    site = common_ancestor_module(work or [n.meta["scope"][-1] for n in exclusive if n.meta.get("scope")])
    return Term(join, value, nodes, role, site, tuple(sorted(owned, key=order.__getitem__)))


def _is_weighted_worker(module: nn.Module) -> bool:
    return module_role(module) in WORK and _has_weights(module)


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or isinstance(module, KernelLinear)


def _branch_role(nodes: frozenset[fx.Node], works: bool) -> str:
    roles = {n.meta.get("role") for n in nodes}
    called = [target_name(n) for n in nodes]
    is_eager = "softmax" in called and sum(name in PRODUCTS for name in called) > 1
    if "attention" in roles or "scaled_dot_product_attention" in called or is_eager:
        return "attention"
    return "ssm" if roles & SCANS else "mlp" if works else "other"


def paths_of_modules_used(node: fx.Node, root: nn.Module) -> list[str]:
    """Modules that a node calls, or whose parameter it reads."""
    if node.op == "call_module":
        return [str(node.target)]
    reads = [str(x.target) for x in node.all_input_nodes if x.op == "get_attr"]
    owners = []
    for path in reads:
        owner, _, name = path.rpartition(".")
        if isinstance(getattr(root.get_submodule(owner), name, None), nn.Parameter):
            owners.append(owner)
    return owners


def common_ancestor_module(paths: list[str]) -> str:
    """The smallest module that encloses all of these modules."""
    split = [p.split(".") for p in paths]
    shared = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)

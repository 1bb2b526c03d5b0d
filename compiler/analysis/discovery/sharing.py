"""Groups of modules that several layers share: one group, cut once, in all of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from ....dsl.checker.skeleton import Group, Member, is_submodule
from ...ir.program import Program

Ties = Sequence[tuple[str, ...]]
Axis = tuple[str, int]


class Shared(Exception):
    """A group's tensor is also something that the group doesn't know of. The text names it."""


def join_shared_groups(groups: Iterable[Group], program: Program, ties: Ties) -> Iterator[Group | tuple[str, str]]:
    """The groups, those that share tensors made one; or the site of one that can't be, and why."""
    first = {name: same[0] for same in ties for name in same}
    for cluster in _cluster_by_shared_axes(list(groups), first):
        try:
            yield _join_cluster(cluster, program, ties, first)
        except Shared as error:
            yield from ((group.site, f"{error} is shared with another module") for group in cluster)


def _cluster_by_shared_axes(groups: list[Group], canonical_names: Mapping[str, str]) -> list[list[Group]]:
    """Groups that have an axis of a shared tensor in common, together, in their order."""
    clusters: list[list[Group]] = []
    axes_of: list[set[Axis]] = []
    for group in groups:
        axes = {(canonical_names[m.tensor], m.axis) for m in group.members if m.tensor in canonical_names}
        match = next(
            (i for i, known in enumerate(axes_of) if known & axes and _have_equal_layout(clusters[i][0], group)), None
        )
        if match is None:
            clusters.append([group])
            axes_of.append(axes)
        else:
            clusters[match].append(group)
            axes_of[match] |= axes
    return clusters


def _have_equal_layout(a: Group, b: Group) -> bool:
    return (a.kind, a.count, a.per_block) == (b.kind, b.count, b.per_block)


def _join_cluster(cluster: list[Group], program: Program, ties: Ties, canonical_names: Mapping[str, str]) -> Group:
    members = [m for group in cluster for m in group.members]
    claimed = {(m.tensor, m.axis) for m in members}
    by_axis: dict[Axis, Member] = {}
    for member in members:
        known = by_axis.setdefault((canonical_names.get(member.tensor, member.tensor), member.axis), member)
        if known.segments != member.segments:
            raise Shared(member.tensor)
    for same in ties:
        axes = {axis for tensor, axis in claimed if tensor in same}
        for name in same if axes else ():
            if _is_read_by_unit(name, program) and not all((name, axis) in claimed for axis in axes):
                raise Shared(name)
    if len(cluster) == 1:
        return cluster[0]
    readers = {(canonical_names.get(m.tensor, m.tensor), m.axis) for g in cluster for m in g.members[-g.readers :]}
    ordered = [replace(by_axis[axis], tensor=axis[0]) for axis in sorted(by_axis, key=readers.__contains__)]
    attributes = tuple(dict.fromkeys(entry for group in cluster for entry in group.attributes))
    return replace(cluster[0], members=tuple(ordered), attributes=attributes, readers=len(readers))


def _is_read_by_unit(tensor: str, program: Program) -> bool:
    """Whether a unit's graph reads a tensor; what lies outside of all units is taken for used."""
    unit = next((unit for path, unit in program.units.items() if is_submodule(tensor, path)), None)
    if unit is None:
        return True
    inner = tensor.removeprefix(f"{unit.path}.") if unit.path else tensor
    return any(is_submodule(inner, node.target) for node in unit.graph.nodes if node.op in ("call_module", "get_attr"))

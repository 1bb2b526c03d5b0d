"""What a step's `on:` selects in a skeleton: branches, layers, groups or linear modules."""

from collections.abc import Sequence
from typing import Any

from ..dsl.selectors import resolve
from ..dsl.skeleton import Branch, Group, Part, Scan, Skeleton
from ..dsl.values import Selector


def branches(skeleton: Skeleton, on: Selector | None) -> tuple[Branch, ...]:
    """Residual branches, unit by unit, in the order in which they run."""
    return _chosen(skeleton.branches, [b.site for b in skeleton.branches], on)


def mixers(skeleton: Skeleton, on: Selector | None) -> tuple[Branch, ...]:
    """Residual branches that scan a state along the sequence."""
    found = [b for b in skeleton.branches if b.role == "ssm"]
    return _chosen(found, [b.site for b in found], on)


def scans(skeleton: Skeleton, on: Selector | None) -> tuple[Scan, ...]:
    """Scans that are left, by the path of their mixer."""
    return _chosen(skeleton.scans, [s.site for s in skeleton.scans], on)


def layers(skeleton: Skeleton, on: Selector | None) -> tuple[str, ...]:
    """Units: the repeated layers of the model."""
    return _chosen(skeleton.units, list(skeleton.units), on)


def groups(skeleton: Skeleton, kind: str, on: Selector | None) -> tuple[Group, ...]:
    """Channel or head groups of a kind."""
    found = [g for g in skeleton.groups if g.kind == kind]
    return _chosen(found, [g.site for g in found], on)


def is_inside(group: Group, branch: Branch) -> bool:
    """Whether a group lives and dies with a branch: its tensors are the branch's modules'."""
    return all(m.tensor.rpartition(".")[0] in branch.parts for m in group.members)


def parts(skeleton: Skeleton, on: Selector | None, kinds: Sequence[str] = ("Linear", "Conv1D")) -> tuple[Part, ...]:
    """Modules of the given kinds."""
    found = [p for p in skeleton.parts if p.kind in kinds]
    return _chosen(found, [p.path for p in found], on)


def _chosen(items: Sequence[Any], paths: list[str], on: Selector | None) -> tuple[Any, ...]:
    if on is None:
        return tuple(items)
    wanted = set(resolve(on, paths))
    return tuple(item for item, path in zip(items, paths, strict=True) if path in wanted)

"""Selection of a step's `on:` in a skeleton: branches, layers, groups or linear modules."""

from collections.abc import Sequence
from typing import Any

from ....dsl.checker.selectors import resolve_selector
from ....dsl.checker.skeleton import Branch, Group, Part, Scan, Skeleton, is_submodule
from ....dsl.checker.structure import is_refusal_for_kind, reason_with_opaque_cause
from ....dsl.checker.values import Selector
from ....dsl.syntax.diagnostics import Fault

nothing_to_narrow = Fault(
    "nothing-to-narrow",
    "A pass narrows channels or heads, and discovery found none in the model that could go.\n\n"
    "Channels can't go alone where a norm takes its mean over them, where an operation that effc doesn't know mixes "
    "them, where another module shares the weights, or where a number is written into the source. A module that "
    "couldn't be captured is taken as a whole.",
)


def branches(skeleton: Skeleton, selector: Selector | None) -> tuple[Branch, ...]:
    """Residual branches, unit by unit, in the order in which they run."""
    return _select_by_path(skeleton.branches, [b.site for b in skeleton.branches], selector)


def removable_branches(skeleton: Skeleton, selector: Selector | None) -> tuple[Branch, ...]:
    """Branches that can be removed as a whole."""
    return tuple(branch for branch in branches(skeleton, selector) if branch.site not in skeleton.stays)


def state_space_branches(skeleton: Skeleton, selector: Selector | None) -> tuple[Branch, ...]:
    """Residual branches that scan a state along the sequence."""
    candidates = [b for b in skeleton.branches if b.role == "ssm"]
    return _select_by_path(candidates, [b.site for b in candidates], selector)


def scans(skeleton: Skeleton, selector: Selector | None) -> tuple[Scan, ...]:
    """Scans that are left, by the path of their mixer."""
    return _select_by_path(skeleton.scans, [s.site for s in skeleton.scans], selector)


def is_inside_layers(skeleton: Skeleton, path: str) -> bool:
    """Whether a module is inside of a layer: of a list's element, where layers run several times and none is a unit."""
    if skeleton.units:
        return any(is_submodule(path, unit) for unit in skeleton.units)
    return any(name.isdigit() for name in path.split("."))


def layers(skeleton: Skeleton, selector: Selector | None) -> tuple[str, ...]:
    """Units: the repeated layers of the model."""
    return _select_by_path(skeleton.units, list(skeleton.units), selector)


def groups(skeleton: Skeleton, kind: str, selector: Selector | None) -> tuple[Group, ...]:
    """Channel or head groups of a kind."""
    candidates = [g for g in skeleton.groups if g.kind == kind]
    return _select_by_path(candidates, [g.site for g in candidates], selector)


def reject_if_model_has_none(skeleton: Skeleton, kind: str, selected: Sequence[Group]) -> tuple[Group, ...]:
    """The groups that a pass is to narrow; Reject, with what discovery says against it, where the model has none."""
    if not selected and not any(g.kind == kind for g in skeleton.groups):
        refusals = sorted(skeleton.facts.get("refused", ()), key=lambda r: not is_refusal_for_kind(r, kind, skeleton))
        reasons = [
            f"{path or 'the model'}: {reason_with_opaque_cause(skeleton, path, reason)}" for path, reason in refusals
        ]
        words = kind.replace("_", " ").replace("kv", "KV")
        first = f"; {reasons[0]}" if reasons else ""
        raise nothing_to_narrow(
            f"{skeleton.model_type} has no {words} that could go{first}",
            note="; ".join(reasons[1:6]),
            help="`effc plan` lists what a model has, and what stays as it is and why",
        ).rejection()
    return tuple(selected)


def searchable_branch_groups_by_kind(
    skeleton: Skeleton, branch_selector: Selector | None
) -> dict[str, tuple[Group, ...]]:
    """Groups that a search over all kinds may narrow, by kind: those inside of branches that may be cut, and of
    attention KV heads where there are, else heads. Where all may be cut, those that lie in no branch may be, too: a net
    without residual branches has no others."""
    allowed = branches(skeleton, branch_selector)
    inside = [g for g in skeleton.groups if any(is_group_inside_branch(g, b) for b in allowed)]
    if branch_selector is None:
        inside += [g for g in skeleton.groups if not any(is_group_inside_branch(g, b) for b in skeleton.branches)]
    shared = {g.site for g in skeleton.groups if g.kind == "kv_heads"}
    by_kind: dict[str, list[Group]] = {}
    for group in inside:
        if group.kind != "heads" or group.site not in shared:
            by_kind.setdefault("heads" if group.kind == "kv_heads" else group.kind, []).append(group)
    return {kind: tuple(some) for kind, some in by_kind.items()}


def is_group_inside_branch(group: Group, branch: Branch) -> bool:
    """Whether a group lives and dies with a branch: its tensors are the branch's modules'."""
    return all(m.tensor.rpartition(".")[0] in branch.parts for m in group.members)


def linear_parts(skeleton: Skeleton, selector: Selector | None) -> tuple[Part, ...]:
    """Linear modules that `selector` selects; all of them without it."""
    candidates = [p for p in skeleton.parts if p.kind in ("Linear", "Conv1D")]
    return _select_by_path(candidates, [p.path for p in candidates], selector)


def inner_parts(skeleton: Skeleton, selector: Selector | None) -> tuple[Part, ...]:
    """Linear modules that `selector` selects; without it those inside the layers, no output head."""
    return tuple(
        p for p in linear_parts(skeleton, selector) if selector is not None or is_inside_layers(skeleton, p.path)
    )


def _select_by_path(items: Sequence[Any], paths: list[str], selector: Selector | None) -> tuple[Any, ...]:
    if selector is None:
        return tuple(items)
    selected = set(resolve_selector(selector, paths))
    return tuple(item for item, path in zip(items, paths, strict=True) if path in selected)

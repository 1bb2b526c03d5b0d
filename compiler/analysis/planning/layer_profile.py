"""A model layer by layer, before and after: which branches are gone, and how wide the others are.

A profile is plain data: one entry per layer under its original path, with its branches by their name below it:

    {"model.layers.3": {"self_attn": {"role": "attention", "heads": 9, "kv_heads": 3},
                        "mlp": {"role": "mlp", "channels": 1536}}}
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ....dsl.checker.skeleton import Branch, Group, Skeleton
from .selection import is_group_inside_branch

Profile = dict[str, dict[str, dict[str, Any]]]
BAR = 20  # characters of a full bar
_WIDTHS = ("channels", "kv_heads", "heads")
_UNITS = {"channels": "channels", "kv_heads": "KV heads", "heads": "heads"}


def layer_group_counts(
    skeleton: Skeleton, remaining_layer_indices: Mapping[str, Sequence[int]] | None = None
) -> Profile:
    """`remaining_layer_indices`: of a module list whose layers were dropped, the original numbers of those that are
    left."""
    layers: Profile = {}
    for unit in skeleton.units:
        branches = {}
        for branch in skeleton.branches:
            if branch.unit == unit:
                inside = [g for g in skeleton.groups if is_group_inside_branch(g, branch)]
                branches[_branch_label(branch, unit)] = {"role": branch.role} | {g.kind: g.count for g in inside}
        layers[original_unit_path(unit, remaining_layer_indices or {})] = branches
    return layers


def layer_group_counts_of_packed(
    before: Skeleton,
    after: Skeleton,
    packed_modules: Mapping[str, Any],
    remaining_layer_indices: Mapping[str, Sequence[int]] | None = None,
) -> Profile:
    """The profile of a model whose linear modules are packed: they tell no groups, but their own sizes do.

    before           with the groups of the original
    packed_modules   path -> {"spec": {"in_features", "out_features"}}, as edits have it
    """
    layers = layer_group_counts(after, remaining_layer_indices)
    for unit in after.units:
        old = original_unit_path(unit, remaining_layer_indices or {})
        for branch in (b for b in before.branches if b.unit == old):
            widths = layers[old].get(_branch_label(branch, old))
            if widths is not None:
                groups = [g for g in before.groups if is_group_inside_branch(g, branch) and g.kind not in widths]
                counts = {g.kind: _remaining_count_from_packed(before, g, packed_modules, old, unit) for g in groups}
                widths |= {kind: count for kind, count in counts.items() if count is not None}
    return layers


def _remaining_count_from_packed(
    before: Skeleton, group: Group, packed_modules: Mapping[str, Any], unit_before: str, unit: str
) -> int | None:
    """Number of items left in a group, from a packed module of which it is a whole axis; None without one."""
    shapes, kinds = before.shapes(), {part.path: part.kind for part in before.parts}
    for member in group.members:
        path = member.tensor.rpartition(".")[0]
        entry = (
            packed_modules.get(unit + path.removeprefix(unit_before)) if path.startswith(f"{unit_before}.") else None
        )
        if entry is None or len(member.segments) != 1:
            continue
        size = member.segments[0][1]
        if size * group.count != shapes[member.tensor][member.axis]:
            continue
        outputs = (member.axis == 0) != (kinds[path] == "Conv1D")  # whose weight lies the other way round
        return entry["spec"]["out_features" if outputs else "in_features"] // size
    return None


def _branch_label(branch: Branch, unit: str) -> str:
    return branch.site.removeprefix(f"{unit}.") if branch.site != unit else branch.role


def original_unit_path(unit: str, remaining: Mapping[str, Sequence[int]]) -> str:
    """The path that a layer had before others were dropped."""
    owner, _, number = unit.rpartition(".")
    return f"{owner}.{remaining[owner][int(number)]}" if owner in remaining else unit


def draw_layer_bars(before: Profile, after: Profile) -> str:
    """A line per layer: a bar for every branch, as long as what is left of its width.

    Where query heads went without their KV heads, the bar is what is left of those, and says so.
    """
    names = list(dict.fromkeys(name for branches in before.values() for name in branches))
    head = ["layer", *(_title(name, before) for name in names)]
    rows = [head]
    for path, branches in sorted(before.items(), key=lambda item: natural_sort_key(item[0])):
        cells = [_bar_cell(branches.get(name), after.get(path, {}).get(name)) for name in names]
        rows.append([path.rpartition(".")[2], *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i == 0 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def natural_sort_key(path: str) -> list[tuple[bool, int, str]]:
    """For sorting: `layers.2` comes before `layers.10`, though a manifest sorts its keys as text."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]


def _title(name: str, before: Profile) -> str:
    kinds = [_width_kind(b[name]) for b in before.values() if name in b]
    unit = _UNITS.get(kinds[0] or "", "") if kinds else ""
    return f"{name} ({unit})" if unit else name


def _width_kind(branch: Mapping[str, Any]) -> str | None:
    return next((kind for kind in _WIDTHS if kind in branch), None)


def _bar_cell(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    if before is None:
        return ""
    if after is None:
        return "·" * BAR + " gone"
    kind = _width_kind(before)
    if kind is None or not before[kind]:
        return "█" * BAR
    if kind not in after and "heads" not in after:
        return "packed"  # and too fused to tell
    full, left, unit = before[kind], _remaining_count(after, kind), ""
    if kind == "kv_heads" and "heads" in after and after["heads"] * full < before.get("heads", 0) * left:
        full, left, unit = before["heads"], after["heads"], " heads"  # these went without their KV heads
    bar = "█" * max(1, round(BAR * left / full))
    loss = f" -{1 - left / full:.0%}" if left < full else ""
    return f"{bar.ljust(BAR, '░')} {left}{unit}{loss}"


def _remaining_count(branch: Mapping[str, Any], group_kind: str) -> int:
    """One query head per KV head is plain attention, whose KV heads aren't counted apart."""
    return branch.get(group_kind, branch.get("heads", 0))

"""Change made by a step, measured on the skeletons before and after, as a person would say it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....dsl.checker.skeleton import Skeleton
from ...core.quantity import signed_count
from . import shrink


@dataclass(frozen=True)
class Change:
    """`summary` in one line, `rows` as plain data for the manifest, `text` as the shape diff."""

    summary: str
    rows: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.rows)


def describe_change(before: Skeleton, after: Skeleton, notes: Sequence[Mapping[str, Any]] = ()) -> Change:
    """Layers and branches that are gone, groups that are narrower, parameters that went; zeros as the step notes."""
    rows = [
        *_removed_layers_lines(before, after),
        *_removed_branch_lines(before, after),
        *_narrowed_group_lines(before, after),
        *_lowered_modules_lines(before, after),
    ]
    # A packed weight is its own, also where it was tied: the skeleton counts it twice, the model has it once.
    removed = 0 if _lowered_modules_lines(before, after) else shrink.param_count(before) - shrink.param_count(after)
    parts = []
    if width := _narrowed_stream_widths(before, after):
        rows.append(f"residual stream {width[0]} -> {width[1]} channels")
        parts.append(f"-{width[0] - width[1]} stream channels")
    parts += [
        p for p in (_removed_counts_text(before, after), f"{signed_count(-removed)} params" if removed else "") if p
    ]
    parts += [f"{100 * note['sparsity']:.1f} % zeros" for note in notes if "sparsity" in note]
    return Change(", ".join(parts) or "values only", tuple(rows))


def _narrowed_stream_widths(before: Skeleton, after: Skeleton) -> tuple[int, int] | None:
    """Widths of the residual stream, where it is narrower."""
    width, width_after = before.facts.get("hidden"), after.facts.get("hidden")
    return (width, width_after) if width and width_after and width_after < width else None


def _removed_counts_text(before: Skeleton, after: Skeleton) -> str:
    layers = len(before.units) - len(after.units)
    branches = len(before.branches) - len(after.branches)
    counts = [f"-{layers} layers" if layers else "", f"-{branches} branches" if branches and not layers else ""]
    if (
        not layers and not branches and not _lowered_modules_lines(before, after)
    ):  # which no longer tell what they couple
        for kind, name in (
            ("channels", "channels"),
            ("kv_heads", "KV heads"),
            ("heads", "heads"),
            ("experts", "experts"),
        ):
            removed = _total_item_count(before, kind) - _total_item_count(after, kind)
            if removed and not (kind == "heads" and counts and counts[-1].endswith("KV heads")):  # they went with them
                counts.append(f"-{removed} {name}")
    return ", ".join([*(c for c in counts if c), *_lowered_modules_lines(before, after)])


def _lowered_modules_lines(before: Skeleton, after: Skeleton) -> list[str]:
    count_after, count_before = (sum(p.kind == "KernelLinear" for p in skeleton.parts) for skeleton in (after, before))
    return [f"{count_after - count_before} linear modules on kernels"] if count_after > count_before else []


def _total_item_count(skeleton: Skeleton, kind: str) -> int:
    return sum(g.count for g in skeleton.groups if g.kind == kind)


def _removed_layers_lines(before: Skeleton, after: Skeleton) -> list[str]:
    removed = len(before.units) - len(after.units)
    return [f"layers {len(before.units)} -> {len(after.units)}"] if removed else []


def _removed_branch_lines(before: Skeleton, after: Skeleton) -> list[str]:
    if len(before.units) != len(after.units):
        return []
    left = {b.site for b in after.branches}
    shapes = before.shapes()
    return [
        f"{b.site} removed, {signed_count(-_param_count(shapes, b.parts))} params"
        for b in before.branches
        if b.site not in left
    ]


def _param_count(shapes: dict[str, tuple[int, ...]], module_paths: tuple[str, ...]) -> int:
    total = 0
    for path, shape in shapes.items():
        if path.rpartition(".")[0] in module_paths:
            size = 1
            for length in shape:
                size *= length
            total += size
    return total


def _narrowed_group_lines(before: Skeleton, after: Skeleton) -> list[str]:
    if len(before.units) != len(after.units) or _lowered_modules_lines(before, after):
        return []
    counts_after = {(g.site, g.kind): g.count for g in after.groups}
    return [
        f"{g.site} {g.count} -> {counts_after[g.site, g.kind]} {g.kind}"
        for g in before.groups
        if counts_after.get((g.site, g.kind), g.count) != g.count
    ]

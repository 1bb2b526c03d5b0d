"""Branches and widths left in each layer: a row per layer, a column per kind of width."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...analysis.planning.layer_profile import natural_sort_key
from ...core.quantity import si_count
from ..manifest import Manifest

UNITS = {
    "channels": "channels",
    "kv_heads": "KV heads",
    "heads": "heads",
    "experts": "experts",
    "ssm_heads": "scan heads",
    "ssm_channels": "scan channels",
    "ssm_state": "states",
}


@dataclass(frozen=True)
class Cell:
    """`was` and `left` of one kind in one layer, as shares of the widest layer for the bar."""

    text: str
    tip: str
    was: float
    left: float
    removed: str = ""
    is_removed: bool = False


@dataclass
class Column:
    branch: str
    kind: str  # "" for a branch that counts nothing: it is there or it is gone
    widest: int = 1
    was: int = 0
    left: int = 0

    @property
    def unit(self) -> str:
        return UNITS.get(self.kind, self.kind)

    @property
    def summary(self) -> str:
        """`608 of 3072 channels went`."""
        removed = self.was - self.left
        of = f"{si_count(removed)} of {si_count(self.was)} {self.unit or 'of them'}"
        return f"{of} went ({100 * removed / self.was:.0f} %)" if removed else ""


@dataclass
class Layers:
    name: str  # of a front's point, else ""
    columns: list[Column] = field(default_factory=list)
    rows: list[tuple[str, str, list[Cell | None]]] = field(default_factory=list)  # number, path, cells

    @property
    def changed(self) -> bool:
        return any(column.left < column.was for column in self.columns)


def layers(manifest: Manifest) -> list[Layers]:
    """One for a model, one for each point of a front, none where no profile is known."""
    if manifest.members:
        return [drawing for m in manifest.members if (drawing := _layer_width_table(m["profile"], m["name"])).rows]
    drawing = _layer_width_table(manifest.profile)
    return [drawing] if drawing.rows else []


def _layer_width_table(profile: Mapping[str, Any], name: str = "") -> Layers:
    before, after = profile.get("before", {}), profile.get("after", {})
    result = Layers(name, _width_columns(before, after))
    for path in sorted(before, key=natural_sort_key):
        cells = [_width_cell(path, column, before[path], after.get(path, {})) for column in result.columns]
        if any(cells):
            result.rows.append((path.rpartition(".")[2], path, cells))
    return result


def _width_columns(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Column]:
    """Branches in the order of the first layer that has them, each with the kinds that it counts."""
    columns: dict[tuple[str, str], Column] = {}
    for path, branches in before.items():
        for branch, was in branches.items():
            kinds = [kind for kind in UNITS if kind in was] or [""]
            if "kv_heads" in kinds and not _lost_query_heads_only(branch, before, after):
                kinds.remove("heads") if "heads" in kinds else None
            for kind in kinds:
                column = columns.setdefault((branch, kind), Column(branch, kind))
                full, left = _widths_before_and_after(was, after.get(path, {}).get(branch), kind)
                column.widest = max(column.widest, full)
                column.was, column.left = column.was + full, column.left + (full if left is None else left)
    return list(columns.values())


def _lost_query_heads_only(branch: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether query heads of a branch went without their KV heads."""
    for path, branches in before.items():
        branch_before, branch_after = branches.get(branch, {}), after.get(path, {}).get(branch)
        if branch_after and "kv_heads" in branch_before and "heads" in branch_before and "heads" in branch_after:
            left = branch_after.get("kv_heads", branch_after["heads"])
            if branch_after["heads"] * branch_before["kv_heads"] < branch_before["heads"] * left:
                return True
    return False


def _widths_before_and_after(
    before: Mapping[str, Any], after: Mapping[str, Any] | None, kind: str
) -> tuple[int, int | None]:
    """Width before and after: None where packed weights don't tell."""
    if not kind:
        return 1, int(after is not None)
    if after is None:
        return before[kind], 0
    if kind == "kv_heads":  # one query head per KV head is plain attention, whose KV heads aren't counted apart
        return before[kind], after.get(kind, after.get("heads"))
    return before[kind], after.get(kind)


def _width_cell(path: str, column: Column, before: Mapping[str, Any], after: Mapping[str, Any]) -> Cell | None:
    was = before.get(column.branch)
    if was is None or (column.kind and column.kind not in was):
        return None
    branch_after = after.get(column.branch)
    full, left = _widths_before_and_after(was, branch_after, column.kind)
    subject = f"{path}, {column.branch}"
    if branch_after is None:
        return Cell(
            "gone", f"{subject}: the whole branch is gone", full / column.widest, 0.0, "−100 %", is_removed=True
        )
    if not column.kind or left is None:
        text = "kept" if not column.kind else f"{full}, packed"
        return Cell(text, f"{subject}: {text}", full / column.widest, full / column.widest)
    loss = f"−{100 * (1 - left / full):.0f} %" if left < full else ""
    tip = f"{subject}: {left} of {full} {column.unit}" + (f" left, {full - left} went" if loss else ", all of them")
    return Cell(str(left), tip, full / column.widest, left / column.widest, loss)

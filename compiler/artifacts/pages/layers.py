"""What each layer kept of its branches: a row per layer, a column per kind of width."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...analysis.planning.layer_profile import numbered
from ...core.quantity import count
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
    lost: str = ""
    gone: bool = False


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
        lost = self.was - self.left
        of = f"{count(lost)} of {count(self.was)} {self.unit or 'of them'}"
        return f"{of} went ({100 * lost / self.was:.0f} %)" if lost else ""


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
        return [made for m in manifest.members if (made := _layers(m["profile"], m["name"])).rows]
    made = _layers(manifest.profile)
    return [made] if made.rows else []


def _layers(profile: Mapping[str, Any], name: str = "") -> Layers:
    before, after = profile.get("before", {}), profile.get("after", {})
    found = Layers(name, _columns(before, after))
    for path in sorted(before, key=numbered):
        cells = [_cell(path, column, before[path], after.get(path, {})) for column in found.columns]
        if any(cells):
            found.rows.append((path.rpartition(".")[2], path, cells))
    return found


def _columns(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Column]:
    """Branches in the order of the first layer that has them, each with the kinds that it counts."""
    columns: dict[tuple[str, str], Column] = {}
    for path, branches in before.items():
        for branch, was in branches.items():
            kinds = [kind for kind in UNITS if kind in was] or [""]
            if "kv_heads" in kinds and not _alone(branch, before, after):
                kinds.remove("heads") if "heads" in kinds else None
            for kind in kinds:
                column = columns.setdefault((branch, kind), Column(branch, kind))
                full, left = _widths(was, after.get(path, {}).get(branch), kind)
                column.widest = max(column.widest, full)
                column.was, column.left = column.was + full, column.left + (full if left is None else left)
    return list(columns.values())


def _alone(branch: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether query heads of a branch went without their KV heads."""
    for path, branches in before.items():
        was, now = branches.get(branch, {}), after.get(path, {}).get(branch)
        if now and "kv_heads" in was and "heads" in was and "heads" in now:
            left = now.get("kv_heads", now["heads"])
            if now["heads"] * was["kv_heads"] < was["heads"] * left:
                return True
    return False


def _widths(was: Mapping[str, Any], now: Mapping[str, Any] | None, kind: str) -> tuple[int, int | None]:
    """How many there were, and how many are left: None where packed weights don't tell."""
    if not kind:
        return 1, int(now is not None)
    if now is None:
        return was[kind], 0
    if kind == "kv_heads":  # one query head per KV head is plain attention, whose KV heads aren't counted apart
        return was[kind], now.get(kind, now.get("heads"))
    return was[kind], now.get(kind)


def _cell(path: str, column: Column, before: Mapping[str, Any], after: Mapping[str, Any]) -> Cell | None:
    was = before.get(column.branch)
    if was is None or (column.kind and column.kind not in was):
        return None
    now = after.get(column.branch)
    full, left = _widths(was, now, column.kind)
    about = f"{path}, {column.branch}"
    if now is None:
        return Cell("gone", f"{about}: the whole branch is gone", full / column.widest, 0.0, "−100 %", gone=True)
    if not column.kind or left is None:
        said = "kept" if not column.kind else f"{full}, packed"
        return Cell(said, f"{about}: {said}", full / column.widest, full / column.widest)
    lost = f"−{100 * (1 - left / full):.0f} %" if left < full else ""
    tip = f"{about}: {left} of {full} {column.unit}" + (f" left, {full - left} went" if lost else ", all of them")
    return Cell(str(left), tip, full / column.widest, left / column.widest, lost)

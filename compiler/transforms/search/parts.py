"""The kinds of parts that a pass lets a search cut, on a skeleton: what there is, what it weighs, what is left."""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ....dsl.checker.skeleton import Branch, Group, Scan, Skeleton
from ....dsl.checker.values import Selector
from ...analysis.discovery.discover import skeleton_of
from ...analysis.planning import shrink
from ...analysis.planning.selection import branches, removable_branches, searchable_branch_groups_by_kind
from .branches import Branches, Layers
from .candidate import Pool
from .savings import OF_MODEL, SCANS, SavingsTable, step_count_of, steps_per_cut
from .scans import Scans
from .slices import Slices
from .widths import Widths

if TYPE_CHECKING:
    from ...ir.program import Program
    from .compensation import GroupRanking


@dataclass(frozen=True)
class Parts(ABC):
    """kind       as a recipe's `order` names it
    parameter  of the pass, that says how large a cut is; "" where it can't be too large
    """

    kind: str
    parameter: str = ""
    groups = tuple[Group, ...]()  # a field of some only
    step = 1
    sliced = False

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of candidates at the start."""

    @abstractmethod
    def make_candidate_pool(self, program: "Program", savings_table: SavingsTable, fitting: "GroupRanking") -> Pool:
        """The candidates of a search."""

    def restricted_to(self, groups: Sequence[Group]) -> "Parts":
        """Parts restricted to groups that can be cut."""
        assert not groups, f"{self.kind} are no groups"
        return self


@dataclass(frozen=True)
class RemovableParts(Parts):
    """Parts that are removed entirely; `all` is their number in the model, of which the last one stays."""

    all: int = 0

    @property
    def count(self) -> int:
        return len(self.names)

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """In the order of the model."""

    @abstractmethod
    def savings_of(self, savings_table: SavingsTable, name: str, quantity: str) -> float:
        """Amount that one of them saves."""

    @abstractmethod
    def without(self, skeleton: Skeleton, name: str) -> Skeleton:
        """The skeleton when one of them is gone."""

    def remove_smallest_or_largest_until_met(
        self, skeleton: Skeleton, is_met: Callable[[Skeleton], bool]
    ) -> tuple[Skeleton, int]:
        """The skeleton when the smallest went until a budget is met, or the largest where those do not meet it, and how
        many: no more than what comes."""
        savings_table = SavingsTable(skeleton)
        order = sorted(self.names, key=lambda name: self.savings_of(savings_table, name, "params"))
        limit = max(0, min(len(order), self.all - 1))

        def left(names: Sequence[str]) -> Skeleton:
            current = skeleton
            for name in sorted(names, key=self.names.index, reverse=True):  # layers behind one move up
                current = self.without(current, name)
            return current

        if not is_met(left(order[:limit])):
            order.reverse()
        count = bisect_left(range(limit), True, key=lambda count: is_met(left(order[:count])))
        return left(order[:count]), count


@dataclass(frozen=True)
class BlockParts(RemovableParts):
    """Residual branches."""

    branches: tuple[Branch, ...] = ()

    @property
    def names(self) -> list[str]:
        return [b.site for b in self.branches]

    def savings_of(self, savings_table: SavingsTable, name: str, quantity: str) -> float:
        return savings_table.branch_savings(name, quantity)

    def without(self, skeleton: Skeleton, name: str) -> Skeleton:
        return shrink.without_branch(skeleton, next(b for b in skeleton.branches if b.site == name))

    def make_candidate_pool(self, program: "Program", savings_table: SavingsTable, fitting: "GroupRanking") -> Pool:
        return Branches(program, self.branches, savings_table)


@dataclass(frozen=True)
class MixerParts(BlockParts):
    """Residual branches of state-space mixers: layers where each chosen one is a layer that the model runs without."""

    def make_candidate_pool(self, program: "Program", savings_table: SavingsTable, fitting: "GroupRanking") -> Pool:
        single_branch = {u for u in program.units if sum(b.unit == u for b in skeleton_of(program).branches) == 1}
        units = [b.unit for b in self.branches]
        if single_branch.issuperset(units):
            layers = Layers(program, units, savings_table)
            if layers.independent:
                return layers
        return Branches(program, self.branches, savings_table)


@dataclass(frozen=True)
class LayerParts(RemovableParts):
    """Whole layers."""

    units: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return list(self.units)

    def savings_of(self, savings_table: SavingsTable, name: str, quantity: str) -> float:
        return savings_table.layer_savings(name, quantity)

    def without(self, skeleton: Skeleton, name: str) -> Skeleton:
        return shrink.without_unit(skeleton, name)

    def make_candidate_pool(self, program: "Program", savings_table: SavingsTable, fitting: "GroupRanking") -> Pool:
        return Layers(program, self.units, savings_table)


@dataclass(frozen=True)
class ScanParts(RemovableParts):
    """Scans of state-space mixers."""

    scans: tuple[Scan, ...] = ()

    @property
    def names(self) -> list[str]:
        return [s.site for s in self.scans]

    def savings_of(self, savings_table: SavingsTable, name: str, quantity: str) -> float:
        if quantity == SCANS:
            return 1
        return (
            savings_table.scan_savings(next(s for s in self.scans if s.site == name), quantity)
            if quantity in OF_MODEL
            else 0
        )

    def without(self, skeleton: Skeleton, name: str) -> Skeleton:
        return shrink.without_scan(skeleton, next(s for s in skeleton.scans if s.site == name))

    def make_candidate_pool(self, program: "Program", savings_table: SavingsTable, fitting: "GroupRanking") -> Pool:
        return Scans(program, self.scans, savings_table)


@dataclass(frozen=True)
class WidthParts(Parts):
    """Groups that lose `step` of their items at a time, masked in what reads them until the search is over."""

    groups: tuple[Group, ...] = ()
    step: int = 1
    least = 1

    @property
    def count(self) -> int:
        return len(self.groups)

    def restricted_to(self, groups: Sequence[Group]) -> "Parts":
        return replace(self, groups=tuple(groups))

    def max_cuts(self, group: Group) -> int:
        """Maximum number of cuts of a group."""
        return max(0, step_count_of(group) - self.least) // self.stride(group)

    def stride(self, group: Group) -> int:
        """Number of steps that a group loses per cut."""
        return steps_per_cut(group, self.step)

    def make_candidate_pool(self, program: "Program", savings_table: SavingsTable, fitting: "GroupRanking") -> Pool:
        return Widths(program, self.groups, self.step, savings_table, fitting.item_importance, fitting.repair)


@dataclass(frozen=True)
class SliceParts(WidthParts):
    """Groups whose cuts are made at once, as norms behind them take their mean over what is left."""

    least: int = 1
    sliced = True

    def make_candidate_pool(self, program: "Program", savings_table: SavingsTable, fitting: "GroupRanking") -> Pool:
        ranked = fitting.make_expert_importance(self.groups) if self.kind == "experts" else fitting.obs_importance
        kind = self.groups[0].kind if self.groups else self.kind
        return Slices(program, self.groups, self.step, savings_table, ranked, kind, self.least)


_INSIDE_SCANS = {"scan_heads": "ssm_heads", "scan_channels": "ssm_channels", "states": "ssm_state"}
_STEPS = {
    "channels": "group",
    "heads": "heads",
    "experts": "experts",
    "scan_heads": "heads",
    "scan_channels": "group",
    "states": "states",
}  # what a pass calls the size of a cut


def select_parts(
    skeleton: Skeleton,
    selector: Selector | None,
    kind_order: Sequence[str],
    step_size_by_parameter: Mapping[str, int],
    min_experts: int = 1,
) -> tuple[Parts, ...]:
    """Parts of several kinds, as far as the model has them, inside of what `selector` selects.

    step_size_by_parameter  how much a cut takes, by the name of the parameter that says it
    """
    blocks, inside = removable_branches(skeleton, selector), searchable_branch_groups_by_kind(skeleton, selector)
    result: list[Parts] = []
    for kind in dict.fromkeys(kind_order):
        if kind == "blocks":
            result += [BlockParts(kind, all=len(skeleton.branches), branches=blocks)] if blocks else []
        elif kind == "scans":
            around = branches(skeleton, selector)
            free = tuple(s for s in skeleton.scans if any(s.site in b.parts for b in around))
            result += [ScanParts(kind, all=len(skeleton.scans), scans=free)] if free else []
        elif groups := inside.get(_INSIDE_SCANS.get(kind, kind), ()):
            size = step_size_by_parameter[_STEPS[kind]]
            if kind in _INSIDE_SCANS:
                result.append(SliceParts(kind, groups=groups, step=size))
            elif kind == "experts":
                result.append(SliceParts(kind, groups=groups, step=size, least=min_experts))
            else:
                result.append(WidthParts(kind, _STEPS[kind], groups=groups, step=size))
    return tuple(result)

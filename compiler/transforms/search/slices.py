"""Heads or states of a mixer, or experts, as candidates that are tried in the shape that they would leave.

A norm behind the scan takes its mean over what is left, so a head whose readers are silenced is not yet one that is
gone: a trial slices, and so does a cut, at once. Sizes are in steps of a group, as in `widths`.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ....dsl.checker.skeleton import Group
from ...analysis.discovery.discover import skeleton_of
from ...analysis.planning import shrink
from ...ir import surgery
from ..editing.rewrite import Rewriter
from .candidate import Candidate, Pool
from .importance import ascending_indices
from .savings import OF_MODEL, SavingsTable, step_count_of
from .widths import slice_group, unit_of

if TYPE_CHECKING:
    from ...ir.program import Program


@dataclass
class RankedItems:
    """The items of one group by the numbers that they had at first: in the order they lie in now, and as they go."""

    block: int
    alive: list[int]
    order: list[int]

    def least_important_per_block(self, count_per_block: int) -> list[int]:
        """The `count_per_block` least important ones of every block that are left."""
        by_block: dict[int, list[int]] = {}
        for item in self.order:
            if item in self.alive:
                by_block.setdefault(item // self.block, []).append(item)
        return [item for b in sorted(by_block) for item in by_block[b][:count_per_block]]


class Slices(Pool):
    """`step` items of every block at a time from any of the groups; each keeps at least `least` per block."""

    def __init__(
        self,
        program: "Program",
        groups: Sequence[Group],
        step: int,
        savings_table: SavingsTable,
        important: Callable[[Group], torch.Tensor],
        kind: str,
        min_items: int = 1,
    ):
        self.program, self.step, self.savings_table, self.kind, self.least = (
            program,
            step,
            savings_table,
            kind,
            min_items,
        )
        self.ranked = {
            g.site: RankedItems(step_count_of(g), list(range(g.count)), ascending_indices(important(g))) for g in groups
        }

    def candidates(self) -> list["Slice"]:
        skeleton = skeleton_of(self.program)
        scans = {s.site for s in skeleton.scans}
        return [
            Slice(self, g, unit_of(g.site, skeleton.units))
            for g in self.groups()
            if step_count_of(g) - self.step >= self.least and (g.kind == "experts" or g.site in scans)
        ]

    def groups(self) -> list[Group]:
        """As they are now."""
        return [g for g in skeleton_of(self.program).groups if g.kind == self.kind and g.site in self.ranked]

    def reachable(self, quantity: str) -> float:
        cuts = {g: max(0, step_count_of(g) - self.least) // self.step for g in self.groups()}
        return sum(count * self.cut_savings(g, quantity) for g, count in cuts.items() if count)

    def cut_savings(self, group: Group, quantity: str) -> float:
        """Savings of a step of a group."""
        removed = self.step * group.count // step_count_of(group)
        if quantity == self.kind:
            return removed
        if quantity == "latency":
            return self.step * self.savings_table.savings_per_step(group.site, group.kind, quantity)
        if quantity not in OF_MODEL:
            return 0
        less = shrink.with_narrowed_group(skeleton_of(self.program), group, group.count - removed)
        return OF_MODEL[quantity](skeleton_of(self.program)) - OF_MODEL[quantity](less)


@dataclass(frozen=True)
class Slice(Candidate):
    """The least important step of one group."""

    pool: Slices
    group: Group
    unit: str

    @property
    def name(self) -> str:
        count = step_count_of(self.group)
        return f"{self.group.site} {count} -> {count - self.pool.step} {self.group.kind}"

    @property
    def location(self) -> str:
        return f"{self.group.site}:{self.group.kind}"

    def applied(self) -> AbstractContextManager[None]:
        return with_narrowed_group_temporarily(self.pool.program, self.group, self._positions())

    def cut(self) -> None:
        pool, positions = self.pool, self._positions()
        ranked = pool.ranked[self.group.site]
        pool.savings_table.note_saved(
            self.group.site, self.group.kind, {of: self.saves(of) for of in pool.savings_table.budget_kinds}
        )
        with Rewriter(pool.program) as rewrite:
            slice_group(pool.program, rewrite, self.group, positions)
        ranked.alive = [item for position, item in enumerate(ranked.alive) if position not in positions]

    def _positions(self) -> set[int]:
        """Current positions of the step's items."""
        ranked = self.pool.ranked[self.group.site]
        return {ranked.alive.index(item) for item in ranked.least_important_per_block(self.pool.step)}

    def saves(self, quantity: str) -> float:
        return self.pool.cut_savings(self.group, quantity)


@contextmanager
def with_narrowed_group_temporarily(program: "Program", group: Group, removed_items: set[int]) -> Iterator[None]:
    """The model with a group narrowed, for as long as the context lasts; tensors and numbers come back after."""
    model = program.model
    tensors = {m.tensor: surgery.tensor_at(model, m.tensor).data for m in group.members}
    holders = {m: dict(vars(m)) for m in {model.get_submodule(module) for module, _, _ in group.attributes}}
    try:
        for member in group.members:
            removed = {i for item in removed_items for i in member.indices(item)}
            parameter = surgery.tensor_at(model, member.tensor)
            left = [i for i in range(parameter.shape[member.axis]) if i not in removed]
            parameter.data = parameter.data.index_select(member.axis, torch.tensor(left, device=parameter.device))
        for module, name, per in group.attributes:
            holder = model.get_submodule(module)
            if name.startswith("config."):  # its neighbours read the same one
                holder.config = copy.copy(holder.config)
            current = surgery.attribute_at(holder, name)
            owner, _, last = f".{name}".rpartition(".")
            setattr(
                surgery.attribute_at(holder, owner[1:]) if owner else holder,
                last,
                round(current - len(removed_items) * per),
            )
        _set_module_sizes(program, tensors)
        yield
    finally:
        for path, value in tensors.items():
            surgery.tensor_at(model, path).data = value
        for holder, before in holders.items():
            vars(holder).update(before)
        _set_module_sizes(program, tensors)


def _set_module_sizes(program: "Program", tensors: dict[str, torch.Tensor]) -> None:
    for path in tensors:
        owner, name = surgery.split_parent_and_name(path)
        if name == "weight":
            surgery.set_sizes_from_weight(program.model.get_submodule(owner))

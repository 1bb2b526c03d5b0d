"""Channels or heads of one module as candidates: a step of the least important ones at a time.

While a search runs, what was cut is zero in the weights that read it; `finish` takes it out of every tensor.
Sizes are in steps of a group: an item, or for query heads under grouped-query attention one item of every KV
head, since each KV head must serve the same number.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ....dsl.checker.skeleton import Group
from ....dsl.syntax.diagnostics import Fault
from ...analysis.discovery.discover import skeleton_of
from ...core.events import iterate_and_report
from ...ir.surgery import attribute_at, replace_tensor_everywhere, tensor_at
from ..editing.rewrite import Rewriter
from .candidate import Candidate, Pool
from .importance import ascending_indices
from .reconstruct import Reconstruction, zeroed_reader_weights
from .savings import SavingsTable, step_count_of, steps_per_cut

if TYPE_CHECKING:
    from ...ir.program import Program

odd_experts = Fault(
    "odd-experts",
    "The experts of a layer would get a width that torch can't multiply in groups.\n\n"
    "The library computes all experts in one grouped matrix product, which wants rows of a multiple of 16 bytes: 4 "
    "channels in float32, 8 in bfloat16.",
)


@dataclass
class RankedGroup:
    """One group while it is being cut; `order` has its items from the least to the most important."""

    group: Group
    order: list[int]
    dead: set[int] = field(default_factory=set)

    @property
    def size(self) -> int:
        return step_count_of(self.group)

    @property
    def left(self) -> int:
        return self.size - len(self.dead) * self.size // self.group.count

    def least_important_per_block(self, count_per_block: int) -> list[int]:
        """The items of the `count_per_block` least important steps that are left."""
        alive = [i for i in self.order if i not in self.dead]
        block = self.group.per_block or self.group.count
        by_block: dict[int, list[int]] = {}
        for item in alive:
            by_block.setdefault(item // block, []).append(item)
        return [item for b in sorted(by_block) for item in by_block[b][:count_per_block]]


class Widths(Pool):
    """`step` items at a time from any of the groups, more where one is computed in larger steps; each keeps at least
    one item more than none.

    important   scores of a group's items, [count], larger for those that matter more
    repair      what makes up in the readers for what is cut; None leaves their weights as they are
    """

    def __init__(
        self,
        program: "Program",
        groups: Sequence[Group],
        step: int,
        savings_table: SavingsTable,
        important: Callable[[Group], torch.Tensor],
        repair: Reconstruction | None = None,
    ):
        self.program, self.step, self.savings_table, self.repair = program, step, savings_table, repair
        self.kind = groups[0].kind if groups else "channels"
        self.sites = [RankedGroup(g, ascending_indices(important(g))) for g in groups]

    def candidates(self) -> list["Narrowing"]:
        units = skeleton_of(self.program).units
        return [
            Narrowing(self, s, unit_of(s.group.site, units), steps_per_cut(s.group, self.step))
            for s in self._refresh_remaining_groups()
            if s.left > steps_per_cut(s.group, self.step)
        ]

    def _refresh_remaining_groups(self) -> list[RankedGroup]:
        """The sites that the program still has, as it has them: a branch that went takes its tensors out of a group."""
        left = []
        for site in self.sites:
            current = _current(site.group, skeleton_of(self.program).groups)
            if current is not None:
                site.group = replace(current, site=site.group.site)  # as the search and its ledger know it
                left.append(site)
        return left

    def reachable(self, quantity: str) -> float:
        return sum(
            (s.left - 1) // step * step * self.savings_table.savings_per_step(s.group.site, s.group.kind, quantity)
            for s in self.sites
            for step in (steps_per_cut(s.group, self.step),)
        )

    def reader_weights_after_removal(self, site: RankedGroup, items: Sequence[int]) -> dict[str, torch.Tensor]:
        """The readers' weights when items go, by tensor path."""
        if self.repair is not None:
            return self.repair.refitted_or_zeroed_reader_weights(site.group, site.dead, items)
        return zeroed_reader_weights(self.program.model, site.group, items)

    def finish(self) -> None:
        dead_items = [(site.group, site.dead) for site in self._refresh_remaining_groups() if site.dead]
        with Rewriter(self.program) as rewrite:
            slice_groups(self.program, rewrite, dead_items)


def _current(group: Group, groups: Sequence[Group]) -> Group | None:
    """A group as a program has it now; one that lost tensors may be found under another module's name."""
    same_kind = [g for g in groups if g.kind == group.kind]
    axes = {(m.tensor, m.axis) for m in group.members}
    mine = [g for g in same_kind if axes.issuperset((m.tensor, m.axis) for m in g.members)]
    return next((g for g in mine if g.site == group.site), mine[0] if len(mine) == 1 else None)


@dataclass(frozen=True)
class Narrowing(Candidate):
    """The least important step of one site."""

    joins: ClassVar[bool] = True

    pool: Widths
    site: RankedGroup
    unit: str
    step: int

    @property
    def name(self) -> str:
        return f"{self.site.group.site} {self.site.left} -> {self.site.left - self.step}"

    @property
    def location(self) -> str:
        return f"{self.site.group.site}:{self.site.group.kind}"

    def applied(self) -> AbstractContextManager[None]:
        return with_parameters_replaced(
            self.pool.program,
            self.pool.reader_weights_after_removal(self.site, self.site.least_important_per_block(self.step)),
        )

    def cut(self) -> None:
        pool, site = self.pool, self.site
        items = site.least_important_per_block(self.step)
        for path, value in pool.reader_weights_after_removal(site, items).items():
            pool.program.model.get_parameter(path).data = value
        site.dead.update(items)
        pool.savings_table.note_narrowed_group(site.group.site, site.group.kind, self.step)
        pool.program.changed()

    def saves(self, quantity: str) -> float:
        return self.pool.savings_table.step_savings(self.site.group.site, self.site.group.kind, self.step, quantity)


@contextmanager
def with_parameters_replaced(program: "Program", value_by_path: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The model with other values in some parameters."""
    before = {path: program.model.get_parameter(path).data for path in value_by_path}
    try:
        for path, value in value_by_path.items():
            program.model.get_parameter(path).data = value
        yield
    finally:
        for path, value in before.items():
            program.model.get_parameter(path).data = value


def slice_group(program: "Program", rewriter: Rewriter, group: Group, removed_items: set[int]) -> None:
    """Take dead items out of every tensor of a group, and set the integers that follow."""
    slice_groups(program, rewriter, [(group, removed_items)])


def slice_groups(
    program: "Program",
    rewriter: Rewriter,
    groups_and_removed_items: Sequence[tuple[Group, set[int]]],
    store_tensor: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Slice several groups at once: of a concatenation each has a part of one axis.

    store_tensor  takes a tensor that is as narrow as it will be, and gives it from where it shall lie
    """
    removed: dict[str, dict[int, set[int]]] = {}
    for group, dead in groups_and_removed_items:
        _refuse_misaligned_expert_width(group, len(dead))
        for member in group.members:
            removed.setdefault(member.tensor, {}).setdefault(member.axis, set()).update(
                i for item in dead for i in member.indices(item)
            )
    for tensor, axes in iterate_and_report(removed.items(), "tensors made narrower"):
        for axis, indices in axes.items():
            total = tensor_at(program.model, tensor).shape[axis]
            rewriter.narrow(tensor, axis, [i for i in range(total) if i not in indices])
        narrow = tensor_at(program.model, tensor)
        if (stored := store_tensor(narrow)) is not narrow:
            replace_tensor_everywhere(program.model, tensor, stored)
    for group, dead in groups_and_removed_items:
        left = group.count - len(dead)
        for module, name, per in group.attributes:
            path = f"{module}.{name}" if module else name
            rewriter.set_attr(path, round(attribute_at(program.model, path) - len(dead) * per))
        program.note(site=group.site, kind=group.kind, removed=sorted(dead), kept=left)


def _refuse_misaligned_expert_width(group: Group, removed_count: int) -> None:
    left = group.count - removed_count
    if left % group.multiple:
        raise odd_experts(
            f"{group.site} would be {left} wide, but experts are multiplied in steps of {group.multiple}",
            help=f"`align: {2 * group.multiple}` keeps widths that are",
        ).rejection()


def unit_of(path: str, units: Sequence[str]) -> str:
    """The layer that a module lies in; "" for one that lies in none."""
    return next((u for u in units if path == u or path.startswith(f"{u}.")), "")

"""Whole residual branches, or whole layers, as candidates."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....dsl.checker.skeleton import Branch
from ....dsl.syntax.diagnostics import Reject
from ...analysis.discovery.bypass import other_operand_of_join
from ...analysis.discovery.discover import skeleton_of
from ..editing.dry_run import copy_on_meta, layer_needed
from ..editing.rewrite import Rewriter
from ..editing.trial import with_branch_skipped, with_layer_skipped
from .candidate import Candidate, Pool
from .savings import SavingsTable

if TYPE_CHECKING:
    from ...ir.program import Program


class Branches(Pool):
    """Residual branches: attention before MLP, then layer by layer; the last one of the model stays."""

    kind = "blocks"

    def __init__(self, program: "Program", selected: Sequence[Branch], savings_table: SavingsTable):
        self.program, self.savings_table = program, savings_table
        self.roles = list(dict.fromkeys(b.role for b in skeleton_of(program).branches))
        self.allowed = {b.site for b in selected}

    def candidates(self) -> list["BranchCut"]:
        branches = skeleton_of(self.program).branches
        if len(branches) <= 1:
            return []
        alive = [b for b in branches if b.site in self.allowed]
        return [BranchCut(self, b) for b in sorted(alive, key=lambda b: self.roles.index(b.role))]

    def reachable(self, quantity: str) -> float:
        branches = skeleton_of(self.program).branches
        each = sorted(self.savings_table.branch_savings(b.site, quantity) for b in branches if b.site in self.allowed)
        return sum(each[1:] if len(each) == len(branches) else each)


@dataclass(frozen=True)
class BranchCut(Candidate):
    """One branch. The layer runs a copy of its graph in which the residual add is its other operand."""

    pool: Branches
    branch: Branch

    @property
    def name(self) -> str:
        return self.branch.site

    location = name

    @property
    def unit(self) -> str:
        return self.branch.unit

    def applied(self) -> AbstractContextManager[None]:
        return with_branch_skipped(self.pool.program, self.branch)

    def cut(self) -> None:
        program, branch = self.pool.program, self.branch
        with Rewriter(program) as rewrite:
            rewrite.drop_branch(
                branch.unit,
                branch.join,
                keep=other_operand_of_join(program.units[branch.unit].graph, branch),
                frees=self.saves("params"),
            )
        self.pool.savings_table.note_dropped_branch(branch.site)

    def saves(self, quantity: str) -> float:
        return self.pool.savings_table.branch_savings(self.branch.site, quantity)


class Layers(Pool):
    """Whole layers, under the numbers that they had when the search began: those behind a cut move up.

    Layers that the model does not run without are no candidates. Where there are such, which ones may change with
    every cut and is found out again; a model that runs without any one of its layers counts on none of them.
    """

    kind = "blocks"

    def __init__(self, program: "Program", selected: Sequence[str], savings_table: SavingsTable):
        self.program, self.savings_table = program, savings_table
        self.names = list(skeleton_of(program).units)  # of what is left, in order
        self.allowed = set(selected)
        self.free = self._names_of_removable_layers()
        self.independent = self.free == self.allowed

    def candidates(self) -> list["LayerCut"]:
        if len(self.names) <= 1:
            return []
        return [LayerCut(self, name, unit) for name, unit in self._pairs() if name in self.free]

    def reachable(self, quantity: str) -> float:
        if not self.independent:
            return self._savings_by_dropping_from_the_end(quantity)
        each = sorted(self.savings_table.layer_savings(name, quantity) for name in self.names if name in self.allowed)
        return sum(each[1:] if len(each) == len(self.names) else each)

    def note_cut_layer(self, original_name: str) -> None:
        """Note that a layer was cut."""
        self.names.remove(original_name)
        self.free = self.free - {original_name} if self.independent else self._names_of_removable_layers()

    def _pairs(self) -> Iterable[tuple[str, str]]:
        return zip(self.names, skeleton_of(self.program).units, strict=True)

    def _names_of_removable_layers(self) -> set[str]:
        """The names of the layers that may go and that the model, as it is, runs without; the last one stays."""
        if len(self.names) <= 1:
            return set()
        return {
            name
            for name, unit in self._pairs()
            if name in self.allowed and _drop_layer_if_removable(copy_on_meta(self.program), unit)
        }

    def _savings_by_dropping_from_the_end(self, quantity: str) -> float:
        """Savings when the last removable layer is dropped repeatedly, from a copy without weights."""
        bare, left, total = copy_on_meta(self.program), list(self.names), 0.0
        while len(left) > 1:
            last = next(
                (
                    name
                    for name, unit in reversed(list(zip(left, bare.units, strict=True)))
                    if name in self.allowed and _drop_layer_if_removable(bare, unit)
                ),
                None,
            )
            if last is None:
                break
            left.remove(last)
            total += self.savings_table.layer_savings(last, quantity)
        return total


def _drop_layer_if_removable(meta_program: "Program", unit_path: str) -> bool:
    """Drop a layer from a copy without weights, if it can go; else the copy stays as it is."""
    try:
        Rewriter(meta_program).drop_layer(unit_path)
    except Reject as rejection:
        if any(d.fault is not layer_needed for d in rejection.diagnostics):
            raise
        return False
    return True


@dataclass(frozen=True)
class LayerCut(Candidate):
    """One layer: it hands on what it was given."""

    pool: Layers
    name: str
    unit: str

    @property
    def location(self) -> str:
        return self.name

    def applied(self) -> AbstractContextManager[None]:
        return with_layer_skipped(self.pool.program, self.unit)

    def cut(self) -> None:
        with Rewriter(self.pool.program) as rewrite:
            rewrite.drop_layer(self.unit)
        self.pool.note_cut_layer(self.name)

    def saves(self, quantity: str) -> float:
        return self.pool.savings_table.layer_savings(self.name, quantity)

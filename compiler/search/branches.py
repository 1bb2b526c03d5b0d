"""Whole residual branches, or whole layers, as candidates."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...dsl.skeleton import Branch
from ..bypass import staying
from ..rewrite import Rewriter
from ..trial import without_branch, without_layer
from .candidate import Candidate, Pool
from .saving import Ledger

if TYPE_CHECKING:
    from ..program import Program


class Branches(Pool):
    """Residual branches: attention before MLP, then layer by layer; the last one of the model stays."""

    kind = "blocks"

    def __init__(self, program: "Program", chosen: Sequence[Branch], ledger: Ledger):
        self.program, self.ledger = program, ledger
        self.roles = list(dict.fromkeys(b.role for b in program.skeleton.branches))
        self.allowed = {b.site for b in chosen}

    def candidates(self) -> list["BranchCut"]:
        branches = self.program.skeleton.branches
        if len(branches) <= 1:
            return []
        alive = [b for b in branches if b.site in self.allowed]
        return [BranchCut(self, b) for b in sorted(alive, key=lambda b: self.roles.index(b.role))]

    def reachable(self, of: str) -> float:
        branches = self.program.skeleton.branches
        each = sorted(self.ledger.branch(b.site, of) for b in branches if b.site in self.allowed)
        return sum(each[1:] if len(each) == len(branches) else each)


@dataclass(frozen=True)
class BranchCut(Candidate):
    """One branch. The layer runs a copy of its graph in which the residual add is its other operand."""

    pool: Branches
    branch: Branch

    @property
    def name(self) -> str:
        return self.branch.site

    place = name

    @property
    def unit(self) -> str:
        return self.branch.unit

    def tried(self) -> AbstractContextManager[None]:
        return without_branch(self.pool.program, self.branch)

    def cut(self) -> None:
        program, branch = self.pool.program, self.branch
        with Rewriter(program) as rewrite:
            rewrite.drop_branch(branch.unit, branch.join, keep=staying(program.units[branch.unit].graph, branch))

    def saves(self, of: str) -> float:
        return self.pool.ledger.branch(self.branch.site, of)


class Layers(Pool):
    """Whole layers, under the numbers that they had when the search began: those behind a cut move up."""

    kind = "blocks"

    def __init__(self, program: "Program", chosen: Sequence[str], ledger: Ledger):
        self.program, self.ledger = program, ledger
        self.names = list(program.skeleton.units)          # of what is left, in order
        self.allowed = set(chosen)

    def candidates(self) -> list["LayerCut"]:
        if len(self.names) <= 1:
            return []
        pairs = zip(self.names, self.program.skeleton.units, strict=True)
        return [LayerCut(self, name, unit) for name, unit in pairs if name in self.allowed]

    def reachable(self, of: str) -> float:
        each = sorted(self.ledger.layer(name, of) for name in self.names if name in self.allowed)
        return sum(each[1:] if len(each) == len(self.names) else each)


@dataclass(frozen=True)
class LayerCut(Candidate):
    """One layer: it hands on what it was given."""

    pool: Layers
    name: str
    unit: str

    @property
    def place(self) -> str:
        return self.name

    def tried(self) -> AbstractContextManager[None]:
        return without_layer(self.pool.program, self.unit)

    def cut(self) -> None:
        with Rewriter(self.pool.program) as rewrite:
            rewrite.drop_layer(self.unit)
        self.pool.names.remove(self.name)

    def saves(self, of: str) -> float:
        return self.pool.ledger.layer(self.name, of)

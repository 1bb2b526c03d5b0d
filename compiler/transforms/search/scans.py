"""Scans of state-space mixers as candidates: without one the convolved input goes on as it is."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....dsl.checker.skeleton import Scan, Skeleton
from ...analysis.discovery.discover import skeleton_of
from ...analysis.planning import shrink
from ..editing.rewrite import Rewriter
from ..editing.scan_removal import drop_scan, unit_copy_without_scan
from ..editing.trial import with_units_bound_temporarily
from .candidate import Candidate, Pool
from .latency import SCAN
from .savings import OF_MODEL, SCANS, SavingsTable

if TYPE_CHECKING:
    from ...ir.program import Program


class Scans(Pool):
    """Scans, layer by layer; the last one of the model stays."""

    kind = SCANS

    def __init__(self, program: "Program", selected: Sequence[Scan], savings_table: SavingsTable):
        self.program, self.savings_table = program, savings_table
        self.allowed = {s.site for s in selected}

    def candidates(self) -> list["ScanCut"]:
        scans = skeleton_of(self.program).scans
        return [ScanCut(self, s) for s in scans if s.site in self.allowed] if len(scans) > 1 else []

    def reachable(self, quantity: str) -> float:
        scans = skeleton_of(self.program).scans
        return all_but_the_last([self.savings_of(s, quantity) for s in scans if s.site in self.allowed], len(scans))

    def savings_of(self, scan: Scan, quantity: str) -> float:
        if quantity == "latency":
            return self.savings_table.latency.per_branch.get(SCAN, 0.0)
        return scan_savings(skeleton_of(self.program), scan, quantity)


def scan_savings(skeleton: Skeleton, scan: Scan, quantity: str) -> float:
    """Savings of removing a scan, by arithmetic on shapes."""
    if quantity == SCANS:
        return 1
    return (
        OF_MODEL[quantity](skeleton) - OF_MODEL[quantity](shrink.without_scan(skeleton, scan))
        if quantity in OF_MODEL
        else 0
    )


def all_but_the_last(savings: Sequence[float], count: int) -> float:
    """The most that scans which may go can save, where one of the model's `count` has to stay."""
    return sum(sorted(savings)[1:] if len(savings) == count else savings)


@dataclass(frozen=True)
class ScanCut(Candidate):
    """One scan. The layer runs a copy of its graph in which the mixer is open and the scan left out."""

    pool: Scans
    scan: Scan

    @property
    def name(self) -> str:
        return f"{self.scan.site} scan"

    location = name

    @property
    def unit(self) -> str:
        return self.scan.unit

    def applied(self) -> AbstractContextManager[None]:
        return with_units_bound_temporarily(self.pool.program, [unit_copy_without_scan(self.pool.program, self.scan)])

    def cut(self) -> None:
        pool = self.pool
        pool.savings_table.note_saved(
            self.scan.site, SCANS, {of: self.saves(of) for of in pool.savings_table.budget_kinds}
        )
        with Rewriter(pool.program) as rewrite:
            drop_scan(pool.program, rewrite, self.scan)
        pool.program.note(site=self.scan.site, kind=SCANS, removed=["scan"])

    def saves(self, quantity: str) -> float:
        return self.pool.savings_of(self.scan, quantity)

"""Latency of a model's branches on this machine."""

from collections import Counter
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from ....dsl.checker.value_text import value_text
from ....dsl.checker.values import MetricRef
from ....dsl.syntax.diagnostics import Fault
from ...analysis.discovery.bypass import copy_without_branch
from ...analysis.discovery.discover import skeleton_of
from ...evaluation.timing import WARMUP, timing_conditions
from ...ir.unit import Unit, graph_code_hash
from ...plugin.clock import Clock
from ..editing.scan_removal import unit_copy_without_scan
from ..editing.trial import with_units_bound_temporarily

if TYPE_CHECKING:
    from ...core.journal import Journal
    from ...ir.program import Program
    from ...plugin.interfaces import Metric
    from .loop import Search

no_clock = Fault(
    "no-clock",
    "Latency is to be saved and the metric that is to measure it reads no clock, or a machine "
    "is named and nothing is measured there.",
)

SCAN = "scan"  # beside the roles of branches: what mixers take for their scan alone
ROUNDS = 3  # medians over so many rounds of a metric's steps


@dataclass(frozen=True)
class Latency:
    """total   what the metric says of the whole model, such as milliseconds per token
    per_branch   by role, what one branch adds to it on average; never less than zero
    """

    total: float
    per_branch: dict[str, float]


def measure_and_note_latency(program: "Program", search: "Search", clock_metric: MetricRef) -> Latency:
    """Latency of a model and of its branches by a metric, recorded; Reject (no-clock) where the metric reads no
    clock."""
    metric = search.ctx.metric(clock_metric)
    if not metric.timed:
        raise no_clock(
            f"`{value_text(clock_metric)}` reads no clock", help="`clock: decode.p50` or `prefill.p50`"
        ).rejection()
    latency = measure_latency_by_role_once(program, metric, search.journal)
    program.note(latency=latency.total, of=value_text(clock_metric), per_branch=latency.per_branch)
    return latency


def measure_latency_by_role_once(program: "Program", timed_metric: "Metric", journal: "Journal") -> Latency:
    """Time the model as it is and without all branches of each role, the cases taking turns step by step.

    Single branches cost less than a clock tells apart, so a role's are left out together and share what that saves:
    the median of what is between the two steps of a turn, as on a machine that others use two medians each of its own
    steps come out in any order.
    The table is journalled: a search that goes on after a kill goes on with the same one.
    Source: own; latency tables as in HALP (Shen et al. 2021, arXiv 2110.10811).
    """
    return Latency(
        **journal.get_or_compute("latency", lambda: _time_model_with_and_without_roles(program, timed_metric))
    )


def _time_model_with_and_without_roles(program: "Program", timed_metric: "Metric") -> dict[str, Any]:
    counts = Counter(b.role for b in skeleton_of(program).branches)
    if skeleton_of(program).scans:
        counts[SCAN] = len(skeleton_of(program).scans)
    cases = {role: _unit_copies_without_branches_of_role(program, role) for role in ("", *counts)}
    totals: list[float] = []
    between: dict[str, list[float]] = {role: [] for role in counts}
    for _ in range(ROUNDS):
        clocks: dict[str, Clock] = {case: timed_metric.clock(program.model) for case in cases}
        seconds_by_case: dict[str, list[float]] = {case: [] for case in cases}
        with timing_conditions(program.model):
            for step in range(WARMUP + clocks[""].count):
                for case in list(cases)[:: 1 if step % 2 == 0 else -1]:
                    with with_units_bound_temporarily(program, cases[case]):
                        seconds_by_case[case].append(clocks[case].step())
        value = clocks[""].value
        totals.append(value(seconds_by_case[""][WARMUP:]))
        for role in counts:
            pairs = zip(seconds_by_case[""][WARMUP:], seconds_by_case[role][WARMUP:], strict=True)
            between[role] += [value([full]) - value([without]) for full, without in pairs]
    saved = {role: max(0.0, median(between[role])) / count for role, count in counts.items()}
    return {"total": median(totals), "per_branch": saved}


def _unit_copies_without_branches_of_role(program: "Program", role: str) -> list[Unit]:
    """Copies of every layer's graph without its branches of a role; made once, since fresh code runs slower at
    first."""
    units = []
    scans = {s.unit: s for s in skeleton_of(program).scans} if role == SCAN else {}
    for path, unit in program.units.items():
        graph = unit_copy_without_scan(program, scans[path]).graph if path in scans else unit.graph
        for branch in skeleton_of(program).branches:
            if (branch.unit, branch.role) == (path, role):
                graph = copy_without_branch(graph, branch)
        units.append(replace(unit, graph=graph, key=graph_code_hash(graph)))
    return units

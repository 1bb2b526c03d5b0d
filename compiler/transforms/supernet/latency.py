"""Latency of a family's choices, from a table of the time that each value of its dimensions saves on this machine."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from ....dsl.checker.value_text import value_text
from ....dsl.checker.values import MetricRef
from ...core.events import Said
from ...core.journal import Journal
from ...ir.capture.capture import capture
from ...plugin.context import Context
from ..training.schedule import seed_of
from .choices import RANK, ElasticDim
from .family import Family

N_TRIALS = 3  # choices that are cut out and timed whole, to tell the table's error


@dataclass(frozen=True)
class LatencyTable:
    """total   what the metric says of the largest choice
    saved   "KIND VALUE LARGEST" -> what one dimension saves when it is set to that value
    error   the table's largest error on choices that were timed whole, as a share of their time
    """

    total: float
    saved: Mapping[str, float]
    dims: tuple[ElasticDim, ...]
    error: float = 0.0

    def estimate(self, choice: Mapping[str, int]) -> float:
        saved = sum(self.saved.get(_entry(dim, choice[dim.name]), 0.0) for dim in self.dims)
        return max(self.total - saved, 0.0)


def _entry(dim: ElasticDim, value: int) -> str:
    return f"{dim.kind} {value} {dim.values[0]} {len(dim.places)}"


def measure_latency_table(family: Family, timed_metric: MetricRef, ctx: Context, journal: Journal) -> LatencyTable:
    """Time the largest choice, and one for every kind of dimensions and value in which all of them have it, each
    cut out.

    A single dimension saves less than a clock resolves, so all of a kind are set together and share the saving.
    Adapters are merged in all, so ranks save nothing. The table is journalled: after a kill the search goes on with the
    same one.
    Source: own; latency tables as in HALP (Shen et al. 2021, arXiv 2110.10811).
    """
    space = family.space
    largest = space.choice("largest")

    def time(choice: Mapping[str, int]) -> float:
        numbers = space.genome(choice)
        return journal.get_or_compute(
            f"time {numbers}", lambda: _measure_copy_cut_to_choice(family, choice, timed_metric, ctx)
        )

    total, saved = time(largest), {}
    dims = tuple(d for d in space.dims if d.kind != RANK)
    for dim in dims:
        for value in dim.values[1:]:
            entry = _entry(dim, value)
            same_entry = [d.name for d in dims if value in d.values[1:] and _entry(d, value) == entry]
            if entry not in saved:
                saved[entry] = max(0.0, total - time(largest | dict.fromkeys(same_entry, value))) / len(same_entry)
    table = LatencyTable(total, saved, dims)
    samples = [space.draw(seed_of("timed", ctx.seed, i)) for i in range(N_TRIALS)]
    errors = [abs(table.estimate(choice) / time(choice) - 1) for choice in samples]
    ctx.emit_event(
        Said(
            f"{value_text(timed_metric)} by table: {max(errors):.1%} off at most, "
            f"on {N_TRIALS} choices that were timed whole"
        )
    )
    return LatencyTable(total, saved, dims, max(errors))


def _measure_copy_cut_to_choice(
    family: Family, choice: Mapping[str, int], timed_metric: MetricRef, ctx: Context
) -> float:
    """Metric of a choice cut out of a copy, without adapters: merged, they cost nothing."""
    bare = Family(capture(copy.deepcopy(family.program.model)), "", family.space, orders=family.orders)
    return float(ctx.metric(timed_metric).measure(bare.cut_program_to_choice(choice).model, ctx))

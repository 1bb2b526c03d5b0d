"""A pass that searches a family: it says how genomes are proposed, the rest is one driver."""

import math
import random
from abc import abstractmethod
from collections.abc import Callable, Sequence

from ....dsl.checker.skeleton import Skeleton
from ....dsl.checker.value_text import value_text
from ....dsl.checker.values import DataRef, MetricRef, Ratio, references_in
from ....dsl.syntax.diagnostics import Diagnostic, Fault
from ...analysis.planning import keys
from ...core.deadline import DeadlineExceeded
from ...core.journal import Journal
from ...ir.outcome import Front, Outcome, Point
from ...plugin.context import Context
from ...plugin.interfaces import Lossy, Pass, param
from ..training.schedule import seed_of
from .elastic_dims import one_choice
from .explorer import Explorer, Genome, Objective
from .family import Family
from .latency import measure_latency_table

report_is_selection = Fault(
    "report-is-selection",
    "A search reports on the rows that it selects by.\n\nSuch a number is too good: the search has fitted those rows.",
)


TIRED = 50  # proposals in a row that were all known, after which a search ends


class Method(Pass):
    """Proposes genomes to an explorer until that has ended."""

    keeps = Lossy()
    changes = ("weights", "branches")
    accepts = ("family",)
    disjoint = {"report": "measure"}
    results = ("front",)

    measure: list[MetricRef] = param("What choices are good at, the most telling first.", least=1, distinct=True)
    report: list[MetricRef] = param(
        "What is measured of the front alone, on rows not selected by.", default=(), distinct=True
    )
    at_most: Ratio | None = param(
        "The most that a choice may have, as a share of the largest one.",
        of=("params", "flops", "bytes"),
        gt=0,
        le=1,
        default=None,
    )
    evals: int = param("Choices that are evaluated, at most.", default=100, ge=1, unit="choices")
    points: int = param("Choices on the front, at most.", default=8, ge=1, unit="choices")

    @abstractmethod
    def explore(self, explorer: Explorer, rng: random.Random) -> None:
        """Evaluate what seems worth it. What is proposed follows from the seed and from values alone."""

    def reads_clock(self) -> bool:
        """A latency is measured on the machine that compiles."""
        return any(ref.name.startswith(("decode.", "prefill.", "throughput")) for ref in self.measure)

    def forwards(self, skeleton: Skeleton) -> int:
        return self.evals

    def result_of(self, outcome: Outcome, ctx: Context) -> Front:
        """The front of a family, after the whole search."""
        assert isinstance(outcome, Family), f"searched in {outcome.kind}"
        refuse_impossible_search(self, outcome, ctx)
        objectives = [Objective.of(ref, ctx) for ref in self.measure]
        clock = next((o.ref for o in objectives if o.timed and not ctx.task_source), None)
        table = measure_latency_table(outcome, clock, ctx, Journal(ctx.workdir / "times.jsonl")) if clock else None
        explorer = Explorer(outcome, ctx, objectives, self.evals, self.at_most, table)
        with explorer.open():
            if ctx.task_source:
                explorer.serve_tasks_until_stopped(ctx.task_source, [Objective.of(ref, ctx) for ref in self.report])
            try:
                self.explore(explorer, random.Random(seed_of("search", ctx.seed)))
            except DeadlineExceeded:
                explorer.record_early_stop_or_reject()
            front = explorer.pareto_front(self.points)
            if not front:
                raise no_finite_choice(len(explorer.known)).rejection()
            points = [self._measure_point(i, genome, explorer, ctx) for i, genome in enumerate(front, 1)]
        outcome.program.note(
            evaluated=len(explorer.known),
            choices=float(outcome.space.size),
            front=[list(genome) for genome in front],
            latency_error=table.error if table else None,
        )
        return Front(tuple(points), ctx.results)

    def _measure_point(self, point_number: int, genome: Genome, explorer: Explorer, ctx: Context) -> Point:
        choice = explorer.space.decoded(genome)
        values = zip(explorer.objectives, explorer.evaluate(genome), strict=True)
        measures = {value_text(o.ref): (o.sign * value, o.unit, o.better) for o, value in values}
        for objective in (Objective.of(ref, ctx) for ref in self.report):
            value = explorer.measure_or_read_value(objective, choice)
            measures[value_text(objective.ref)] = (value, objective.unit, objective.better)
        return Point(f"choice_{point_number}", "", measures, choice)


def no_finite_choice(count: int) -> Diagnostic:
    return one_choice(
        f"none of the {count} choices that were evaluated has finite measures within the limits",
        help="evaluate more, or loosen `at_most`",
        argument="at_most",
    )


def refuse_impossible_search(search_pass: Method, family: Family, ctx: Context) -> None:
    """Reject a search over one choice, or one that reports on the rows that it selects by."""
    if family.space.size < 2:
        raise one_choice(
            "the family has one choice, and there is nothing to search", help="leave the step out"
        ).rejection()
    selects = _data_identities(search_pass.measure, ctx)
    for name, identity in _data_identities(search_pass.report, ctx).items():
        if identity in selects.values():
            raise report_is_selection(
                f"`report` is measured on `{name}`, whose rows the search selects by",
                help="report on other rows, or leave `report` out",
                argument="report",
            ).rejection()


def _data_identities(metrics: Sequence[MetricRef], ctx: Context) -> dict[str, str]:
    refs = {ref.name: ref for metric in metrics for ref in references_in(dict(metric.args), DataRef)}
    return {name: keys.data_identity(ref, ctx) for name, ref in refs.items()}


def value_counts_by_dim(explorer: Explorer) -> list[int]:
    return [len(dim.values) for dim in explorer.space.dims]


def allowed_extreme_genomes(explorer: Explorer) -> list[Genome]:
    """The largest, the middle and the smallest choice, as far as they may be taken."""
    return [
        g
        for how in ("largest", "middle", "smallest")
        if explorer.allows(g := explorer.space.genome(explorer.space.choice(how)))
    ]


def evaluate_extremes_and_proposals(
    explorer: Explorer, proposal_rng: random.Random, propose: Callable[[], Genome]
) -> None:
    """Evaluate the ends, then what is proposed, until evaluations are used up or proposals are known ones.

    propose   draws from `proposal_rng`, and goes by what the explorer knows
    """
    explorer.prefetch(allowed_extreme_genomes(explorer))
    for genome in allowed_extreme_genomes(explorer):
        if not explorer.is_exhausted:
            explorer.evaluate(genome)
    misses = 0
    while not explorer.is_exhausted and misses < TIRED:
        before = len(explorer.known)
        explorer.prefetch(next_proposals_per_worker(explorer, proposal_rng, propose))
        explorer.evaluate(propose())
        misses = 0 if len(explorer.known) > before else misses + 1


def next_proposals_per_worker(
    explorer: Explorer, proposal_rng: random.Random, propose: Callable[[], Genome]
) -> list[Genome]:
    """Next proposals, one for each worker, if none of them improves on the known ones.

    The first is what is proposed next; another may turn out wrong, and was then measured for nothing.
    """
    state, known, result = proposal_rng.getstate(), dict(explorer.known), []
    count = explorer.ctx.remote_scorer.size if explorer.ctx.remote_scorer else 0
    for _ in range(count):
        genome = propose()
        if not explorer.is_exhausted:
            result.append(genome)
            explorer.known.setdefault(genome, (math.inf,) * len(explorer.objectives))
    proposal_rng.setstate(state)
    explorer.known = known
    return result


def sample_allowed_genome(explorer: Explorer, rng: random.Random) -> Genome:
    """An allowed genome that is new; where none turns up, the last one drawn moved towards the smallest."""
    genome: Genome = ()
    for _ in range(200):
        genome = tuple(rng.randrange(size) for size in value_counts_by_dim(explorer))
        if genome not in explorer.known and explorer.allows(genome):
            return genome
    while not explorer.allows(genome):
        shrinkable = [i for i, size in enumerate(value_counts_by_dim(explorer)) if genome[i] < size - 1]
        index = rng.choice(shrinkable)
        genome = (*genome[:index], genome[index] + 1, *genome[index + 1 :])
    return genome

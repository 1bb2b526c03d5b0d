"""Shared by searches over a family: evaluations, each run once, and the Pareto front."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ....dsl.checker.value_text import value_text
from ....dsl.checker.values import MetricRef, Ratio
from ....dsl.syntax.diagnostics import Fault, Reject
from ...analysis.planning import shrink
from ...core.cache import canonical_json_sha256
from ...core.deadline import EarlyStop
from ...core.events import Said, Ticked
from ...core.journal import Journal
from ...core.quantity import count_text, measurement_text
from ...models.rows.forward import not_a_number
from ...plugin.context import Context
from .family import Family
from .latency import LatencyTable

if TYPE_CHECKING:
    from ...plugin.remote_scorer import Task, TaskSource

Genome = tuple[int, ...]
Values = tuple[float, ...]  # in the order of the objectives; each turned so that less is better

none_small_enough = Fault(
    "none-small-enough", "A search may take no choice of a family: its smallest is larger than what is asked for."
)
_COUNTS: dict[str, Callable[..., float]] = {
    "params": lambda skeleton, **_: shrink.param_count(skeleton),
    "bytes": lambda skeleton, **_: shrink.param_bytes(skeleton),
    "flops": lambda skeleton, context=512: shrink.flops_per_token(skeleton, context),
}


@dataclass(frozen=True)
class Objective:
    """A metric that a search makes good; `sign` is -1 where more is better."""

    ref: MetricRef
    unit: str
    better: str
    sign: int
    timed: bool

    @staticmethod
    def of(ref: MetricRef, ctx: Context) -> "Objective":
        word = ctx.metric(ref)
        return Objective(ref, word.unit, word.better, 1 if word.better == "lower" else -1, word.timed)


@dataclass
class Explorer:
    """Evaluations of one search, and how far it is.

    cap     the most that a choice may have of params, flops or bytes, as a share of the largest one's
    evals   how many choices may be evaluated
    known   what was evaluated, in that order
    Every value is on disk before it is used, under the space and the metric that it is of: a search that goes on after
    a kill asks again in the same order, and the values of another space are never read.
    """

    family: Family
    ctx: Context
    objectives: Sequence[Objective]
    evals: int
    cap: Ratio | None = None
    table: LatencyTable | None = None
    known: dict[Genome, Values] = field(default_factory=dict)
    _counts: dict[Genome, float] = field(default_factory=dict)
    _take: Callable[[Mapping[str, int]], None] | None = None
    is_over: bool = False
    _spent: float = 0.0  # seconds of measuring

    def __post_init__(self) -> None:
        self.space = self.family.space
        self.journal = Journal(self.ctx.workdir / "genomes.jsonl")
        self._largest_count = self._count(self.space.choice("largest")) if self.cap else math.inf
        self._require_cap_allows_smallest()

    # -- what may be taken -----------------------------------------------------------------------------------

    def allows(self, genome: Genome) -> bool:
        if self.cap is None:
            return True
        if genome not in self._counts:
            self._counts[genome] = self._count(self.space.decoded(genome))
        return self._counts[genome] <= self.cap.value * self._largest_count

    def _count(self, choice: Mapping[str, int]) -> float:
        assert self.cap is not None, "there is no cap"
        return _COUNTS[self.cap.of or "params"](self.family.smaller_skeleton(choice))

    def _require_cap_allows_smallest(self) -> None:
        if self.cap is None:
            return
        of, least = self.cap.of or "params", self._count(self.space.choice("smallest")) / self._largest_count
        if least > self.cap.value:
            share = math.ceil(1000 * least) / 10
            raise none_small_enough(
                f"at most {self.cap.value:.1%} of {of} may stay, and the nearest, the smallest, has {least:.1%}",
                help=f"write `at_most: {share:g}% of {of}`, or train a family with smaller choices",
                argument="at_most",
            ).rejection()

    @property
    def is_exhausted(self) -> bool:
        """Whether nothing more may be evaluated, or nothing is left."""
        return len(self.known) >= self.evals or len(self.known) >= self.space.size

    # -- evaluations -----------------------------------------------------------------------------------------

    @contextmanager
    def open(self) -> Iterator["Explorer"]:
        """The family runs as what is evaluated, for as long as this lasts."""
        with self.family.with_switchable_choice() as take:
            self._take = take
            yield self
        self._take = None

    def evaluate(self, genome: Sequence[int]) -> Values:
        """Values of a choice; each is measured once."""
        genome = tuple(int(value) for value in genome)
        if genome not in self.known:
            choice = self.space.decoded(genome)
            self.known[genome] = tuple(o.sign * self.measure_or_read_value(o, choice) for o in self.objectives)
            self.ctx.tick(Ticked("evaluated", len(self.known), self.evals, self._progress_text()))
        return self.known[genome]

    def measure_or_read_value(self, objective: Objective, choice: Mapping[str, int]) -> float:
        """Value of one metric for a choice, from the journal or measured; infinitely bad where it is not finite."""
        name = objective.ref.name
        if name in _COUNTS:
            return float(_COUNTS[name](self.family.smaller_skeleton(choice), **dict(objective.ref.args)))
        if objective.timed:
            assert self.table is not None, "nothing was timed"
            return self.table.estimate(choice)
        key, task = self._key_and_task(objective, self.space.genome(choice))
        measure = partial(self._measure_within_deadline, objective, choice)
        if self.ctx.remote_scorer:
            with nullcontext() if self.is_over else self.ctx.run.interruptible_search():
                return self.ctx.remote_scorer.value_from_workers(self.journal, key, task, measure)
        return self.journal.get_or_compute(key, measure)

    def _measure_within_deadline(self, objective: Objective, choice: Mapping[str, int]) -> float:
        started = time.monotonic()
        with nullcontext() if self.is_over else self.ctx.run.interruptible_search():
            value = self.activate_and_measure(objective, choice)
        self._spent += time.monotonic() - started
        return value

    def record_early_stop_or_reject(self) -> None:
        """Leave it at what was evaluated. Raises Reject (no-time) where that is nothing."""
        deadline = self.ctx.run.deadline
        assert deadline, "nobody said how long a search may take"
        if not self.known:
            raise deadline.too_short_rejection("one choice", self._spent or deadline.allowed)
        self.is_over = True  # what is on the front may still be measured for the report
        reached = f"{count_text(len(self.known), 'choice')} of {self.evals} evaluated"
        deadline.stop = EarlyStop(reached, {"evaluated": len(self.known)})
        self.ctx.emit_event(Said(f"search: the time is over after {reached}"))

    def _key_and_task(self, objective: Objective, genome: Genome) -> tuple[str, "Task"]:
        """Key of a value, and the task for a worker."""
        key = canonical_json_sha256([self.space.identity, value_text(objective.ref), list(genome)])
        return key, {"genome": list(genome), "metric": value_text(objective.ref)}

    def prefetch(self, genomes: Iterable[Genome]) -> None:
        """Say which choices will be evaluated next, if nothing unforeseen comes: workers measure them meanwhile."""
        if self.ctx.remote_scorer:
            remote = [o for o in self.objectives if o.ref.name not in _COUNTS and not o.timed]
            new = [g for g in dict.fromkeys(genomes) if g not in self.known]
            self.ctx.remote_scorer.prefetch(self.journal, dict(self._key_and_task(o, g) for g in new for o in remote))

    def serve_tasks_until_stopped(self, task_source: "TaskSource", report_objectives: Iterable[Objective]) -> None:
        """Serve tasks in a worker: measure what is asked, for as long as it is."""
        known = {value_text(o.ref): o for o in (*self.objectives, *report_objectives)}
        while True:
            task = task_source.next()
            choice = self.space.decoded(task["genome"])
            task_source.answer(self.activate_and_measure(known[task["metric"]], choice))

    def activate_and_measure(self, objective: Objective, choice: Mapping[str, int]) -> float:
        assert self._take is not None, "the explorer is not open"
        self._take(choice)
        try:
            return float(self.ctx.metric(objective.ref).measure(self.family.program.model, self.ctx))
        except Reject as rejection:
            if any(d.fault is not not_a_number for d in rejection.diagnostics):
                raise
            return objective.sign * math.inf

    def _progress_text(self) -> str:
        front = self.pareto_front()
        best = min(front, key=lambda g: self.known[g])
        best_text = ", ".join(
            f"{value_text(o.ref)} {measurement_text(o.sign * v, o.unit)}"
            for o, v in zip(self.objectives, self.known[best], strict=True)
        )
        return f"{len(front)} on the front, best {best_text}"

    # -- the front -------------------------------------------------------------------------------------------

    def pareto_front(self, max_points: int | None = None) -> list[Genome]:
        """Allowed choices that no other one beats, the best at the first objective in front; of equals the first.

        max_points   thin it to so many, of close neighbours one
        """
        allowed = {g: v for g, v in self.known.items() if self.allows(g)}
        return thin_front(non_dominated(allowed), allowed, max_points or len(allowed))


def beats(values: Values, other_values: Values) -> bool:
    """Whether values are nowhere worse, and somewhere better."""
    return all(a <= b for a, b in zip(values, other_values, strict=True)) and values != other_values


def non_dominated(values_by_genome: Mapping[Any, Values]) -> list[Any]:
    """Pareto front by values; of equal ones the first."""
    first: dict[Values, Any] = {}
    for genome, values in values_by_genome.items():
        if all(math.isfinite(v) for v in values):
            first.setdefault(values, genome)
    return [first[v] for v in sorted(first) if not any(beats(other, v) for other in first)]


def thin_front(front: list[Genome], values_by_genome: Mapping[Genome, Values], max_points: int) -> list[Genome]:
    """Thin a front to at most so many points, the best of every objective among them: the one that is closest to its
    neighbours goes.

    Source: crowding distance, Deb et al. 2002 (NSGA-II), section III-B.
    """
    front = list(front)
    while len(front) > max(max_points, 1):
        scores = crowding_distances([values_by_genome[g] for g in front])
        front.pop(min(range(len(front)), key=lambda i: (scores[i], -i)))
    return front


def crowding_distances(values: Sequence[Values]) -> list[float]:
    """Crowding distance over all objectives; infinite at the ends."""
    distances = [0.0] * len(values)
    for axis in range(len(values[0])):
        order = sorted(range(len(values)), key=lambda i: values[i][axis])
        spread = values[order[-1]][axis] - values[order[0]][axis] or 1.0
        distances[order[0]] = distances[order[-1]] = math.inf
        for before, current, after in zip(order, order[1:], order[2:], strict=False):
            distances[current] += (values[after][axis] - values[before][axis]) / spread
    return distances


def neighbours(genome: Genome, value_counts: Iterable[int]) -> list[Genome]:
    """Genomes that are one step away in one dimension."""
    neighbours = []
    for index, size in enumerate(value_counts):
        for value in (genome[index] - 1, genome[index] + 1):
            if 0 <= value < size:
                neighbours.append((*genome[:index], value, *genome[index + 1 :]))
    return neighbours

"""Search of steps: single changes are measured first, then the combinations that they foretell to be best.

Every decision follows from measurements that are kept, the time that they took included: a search that was killed goes
on and decides the same.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from ....dsl.syntax.diagnostics import Fault, Reject
from ...analysis.planning.plan import Plan
from ...core.events import Said, announcing_stage
from ...core.quantity import count_text, duration_text
from ...core.stopping import raise_if_stopped
from .alternatives import Candidate, allowed_candidates, candidate_named
from .effects import Effects
from .feasibility import refuse_bounds_far_from_the_original
from .journal import Journal
from .trials import QUICK_ROWS, Trial, Trials, judge_trial, relative_bound_miss
from .wish import Wish

SINGLES, COMBINATIONS = 0.6, 0.85  # shares of the time after which no further one is begun
SLACK = 0.01  # by which a first look, or what is predicted, may miss a bound
GAIN = 0.01  # by which a combination must be predicted better than the best so far to be measured
FINALISTS = 4  # measured on all rows
FRONT = 5  # candidates of a front of two metrics at most
MISSES = 4  # candidates measured though they are predicted to miss a bound, where none keeps all

not_measurable = Fault(
    "not-measurable",
    "The unchanged model can't be compiled or measured as a search of steps asks, so nothing can be compared with it.",
)
too_little_time = Fault(
    "too-little-time",
    "A search of steps was given less time than its first candidates take.\n\n"
    "`within:` covers the search: the unchanged model and at least one change of it have to be measured.",
)


@dataclass
class Search:
    """A search under way. `quick_trials` and `finals` have trials on few rows and on all."""

    wish: Wish
    trials: Trials
    journal: Journal
    quick_trials: dict[Candidate, Trial] = field(default_factory=dict)
    finals: dict[Candidate, Trial] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)
    out_of_time: bool = False  # candidates that might be better were not measured
    is_named: bool = False  # a candidate was asked for by its name, so nothing was searched

    def __post_init__(self) -> None:
        self._planned: dict[Candidate, float] = {}
        self._lap_start = self.trials.clock_seconds()  # what went before is in the seconds and overheads of trials
        self.candidates = allowed_candidates(self.wish)

    @property
    def unchanged(self) -> Candidate:
        return self.candidates[0]

    @property
    def measured_count(self) -> int:
        """Number of candidates that were measured, on few rows or on all; those whose plan was refused are not."""
        return len({c for c, t in (*self.quick_trials.items(), *self.finals.items()) if not t.refused})

    @property
    def refused_count(self) -> int:
        """Number of candidates whose plan or compile was refused."""
        return len({c for c, t in (*self.quick_trials.items(), *self.finals.items()) if t.refused})

    @property
    def seconds(self) -> float:
        """Time that the search took, that of killed runs up to their last measurement included."""
        return sum(t.seconds + t.overhead for t in (*self.quick_trials.values(), *self.finals.values()))

    @cached_property
    def objectives(self) -> tuple[str, ...]:
        """Names of the metrics to be best at: one, or the two of a front."""
        return tuple(self.wish.metric_text_on_choose_rows(ref) for ref in self.wish.objectives)

    @property
    def is_front(self) -> bool:
        return len(self.wish.objectives) > 1

    def run(self) -> list[Candidate]:
        """Candidates measured on all rows, best first; those that miss a bound come last."""
        self._measure_single_changes()
        self._measure_combinations()
        self._measure_finalists()
        return self.rank_measured_feasible_first(self.finals)

    def select_front(self, trials: Mapping[Candidate, Trial], max_violation: float = 0.0) -> list[Candidate]:
        """Candidates that keep the bounds, each by more than GAIN better than every other at one of both metrics, best
        at the first metric first. Of more than FRONT those that add most to the ones before are taken."""

        def gain_beside(candidate: Candidate, rivals: Iterable[Candidate]) -> float:
            return self.epsilon_gain(trials[candidate], [trials[rival] for rival in rivals if rival != candidate])

        points = [
            c
            for c in self.rank_measured_feasible_first(trials, max_violation)
            if self.worst_bound_violation(trials[c]) <= max_violation
        ]
        for candidate in reversed(points[:]):
            if gain_beside(candidate, points) <= GAIN:
                points.remove(candidate)
        chosen = points[:1]
        while len(chosen) < min(FRONT, len(points)):
            chosen.append(max((c for c in points if c not in chosen), key=lambda c: gain_beside(c, chosen)))
        return sorted(chosen, key=lambda c: self.objective_costs(trials[c]))

    def measure_named(self, name: str) -> Candidate:
        """The candidate of a name, measured on all rows, beside those that were measured before."""
        candidate = candidate_named(name, self.candidates)
        self.quick_trials |= {
            c: t for c in self.candidates if (t := self.journal.read_trial(c, QUICK_ROWS)) is not None
        }
        self.finals |= {c: t for c in self.candidates if (t := self.journal.read_trial(c, 0)) is not None}
        self.finals |= self._read_or_measure_trials({candidate: None}, 0)
        self.is_named = True
        return candidate

    def rank_measured_feasible_first(
        self, trials: Mapping[Candidate, Trial], max_violation: float = 0.0
    ) -> list[Candidate]:
        """Candidates that were measured: those that keep the bounds by the objective, then the others by their miss."""
        known = [c for c, trial in trials.items() if not trial.refused]
        violations = {c: v if (v := self.worst_bound_violation(trials[c])) > max_violation else 0.0 for c in known}
        return sorted(
            known, key=lambda c: (violations[c], self.objective_costs(trials[c]), self._sum_of_other_costs(trials[c]))
        )

    def _sum_of_other_costs(self, trial: Trial) -> float:
        """Sum of the other metrics relative to the original, which decides between candidates of equal objective."""
        return sum(self._signed_ratio(trial, name) for name in self.trials.metrics if name not in self.objectives)

    def objective_costs(self, trial: Trial) -> tuple[float, ...]:
        """Objectives relative to the original, so that less is better."""
        return tuple(self._signed_ratio(trial, name) for name in self.objectives)

    def epsilon_gain(self, trial: Trial, rivals: Sequence[Trial]) -> float:
        """Share by which a trial is better than each rival at the objective where it gains most (the additive epsilon
        indicator); infinite beside none."""
        pairs = (zip(self.objective_costs(trial), self.objective_costs(rival), strict=True) for rival in rivals)
        return min(
            (max((other - cost) / max(abs(other), 1e-12) for cost, other in costs) for costs in pairs), default=math.inf
        )

    def _signed_ratio(self, trial: Trial, name: str) -> float:
        return self._signs[name] * trial.ratio_to_original(name)

    @cached_property
    def _signs(self) -> dict[str, int]:
        """By metric 1 where less is better, -1 where more is."""
        metric = self.wish.context.metric
        return {name: 1 if metric(ref).better == "lower" else -1 for name, ref in self.trials.metrics.items()}

    def worst_bound_violation(self, trial: Trial) -> float:
        """Share by which a trial misses the bound that it misses most; 0 where it keeps all."""
        return max((relative_bound_miss(o) for o in judge_trial(self.wish, trial, self.wish.context)), default=0.0)

    def _measure_single_changes(self) -> None:
        singles = [c for c in self.candidates if c.changes <= 1]
        plans = {c: p for c in singles if (p := self._plan(c)) is not None}
        planned = self._planned_seconds(plans)
        first = self._known_or_measured_quick_trial(self.unchanged, plans.get(self.unchanged))
        if first.refused:
            raise not_measurable(f"the unchanged model: {first.refused}", self.wish.emit.call.span).rejection()
        shortest = min((planned[c] for c in plans if c != self.unchanged), default=0.0)
        if (least := first.seconds + first.overhead + shortest) > self.wish.seconds:
            needed, minutes = duration_text(least), max(1, round(4 * least / 60))
            raise too_little_time(
                f"the unchanged model and the shortest change take {needed}",
                self.wish.step.call.argument_or_call_span("within"),
                help=f"give it more, such as `within: {minutes}min`; as an option `--within {minutes}min`",
            ).rejection()
        refuse_bounds_far_from_the_original(self.wish, first)
        for candidate in self._single_changes_in_order(plans, planned):
            fits = self.seconds + self._actual_to_planned_seconds * planned[candidate] <= SINGLES * self.wish.seconds
            if fits or not any(c.changes and not t.refused for c, t in self.quick_trials.items()):
                self._known_or_measured_quick_trial(candidate, plans[candidate])
            elif candidate not in self.quick_trials:
                self.out_of_time = True

    def _single_changes_in_order(
        self, plans: Mapping[Candidate, Plan], planned: Mapping[Candidate, float]
    ) -> list[Candidate]:
        """The quickest ones first, of them the smallest artifacts; in front of all is the largest format that makes the
        artifact smaller: it most probably keeps bounds on quality, so that a short search has a result."""
        bytes_of = {c: disk_bytes(plan) for c, plan in plans.items()}
        ordered = sorted(plans, key=lambda c: (_duration_class(planned[c]), bytes_of[c]))
        formats = [c for c in plans if not c.steps(self.wish.data.name) and bytes_of[c] < bytes_of[self.unchanged]]
        mildest = max(formats, key=lambda c: bytes_of[c], default=None)
        return sorted(ordered, key=lambda c: c != mildest)

    def _measure_combinations(self) -> None:
        tried = 0
        while True:
            satisfying = [t for t in self.quick_trials.values() if not t.refused and not self.worst_bound_violation(t)]
            predicted = min(self._predictions_of_promising(satisfying), key=lambda entry: entry[:3], default=None)
            if predicted is None or (predicted[0] > 0 and (satisfying or tried == MISSES)):
                return
            candidate, plan = predicted[3], self._plan(predicted[3])
            if plan is None:
                continue
            expected = self._actual_to_planned_seconds * self._planned_seconds({candidate: plan})[candidate]
            if self.seconds + expected > COMBINATIONS * self.wish.seconds:
                self.out_of_time = True
                return
            tried += predicted[0] > 0
            self._known_or_measured_quick_trial(candidate, plan)

    def _predictions_of_promising(
        self, satisfying: Sequence[Trial]
    ) -> Iterator[tuple[float, float, tuple[float, ...], Candidate]]:
        """Miss, negated gain and objectives of what was not measured and may be better than those that keep all
        bounds."""
        original = self.quick_trials[self.unchanged]
        adds = frozenset(
            name for name, ref in self.trials.metrics.items() if self._is_effect_additive(name, ref, original)
        )
        effects = Effects(self.quick_trials, self.unchanged, adds)
        for candidate in self.candidates:
            if candidate in self.quick_trials:
                continue
            values = {name: effects.predict(candidate, name) for name in self.trials.metrics}
            if any(value is None for value in values.values()):
                continue
            trial = Trial({n: (v, original.values[n][1]) for n, v in values.items() if v is not None})
            gain, violation = self.epsilon_gain(trial, satisfying), self.worst_bound_violation(trial)
            if gain > GAIN:
                yield (0.0 if violation <= SLACK else violation), -gain, self.objective_costs(trial), candidate

    def _is_effect_additive(self, name: str, ref: Any, trial: Trial) -> bool:
        return self.wish.context.metric(ref).better != "lower" or trial.values[name][1] <= 0

    def _measure_finalists(self) -> None:
        """Measure the best on all rows, as many as there is time for; where none of them keeps all bounds, further ones
        that did on few rows."""
        finalists = self.select_front(self.quick_trials, SLACK) if self.is_front else []
        finalists = finalists or self.rank_measured_feasible_first(self.quick_trials, SLACK)[:FINALISTS]
        self.finals |= self._read_or_measure_trials(
            dict.fromkeys(self._finalists_within_time(finalists) or finalists[:1]), 0
        )
        remaining = [c for c in self.rank_measured_feasible_first(self.quick_trials) if c not in self.finals]
        for candidate in remaining[:FINALISTS]:
            if (
                self.best
                or self.worst_bound_violation(self.quick_trials[candidate])
                or not self._finalists_within_time([candidate])
            ):
                return
            self.finals |= self._read_or_measure_trials({candidate: None}, 0)

    def _finalists_within_time(self, finalists: Sequence[Candidate]) -> list[Candidate]:
        """The first of the candidates that can be measured on all rows in the time that is left: each takes about as
        long as on few, less what its artifact took."""
        totals = accumulate((self.quick_trials[c].seconds for c in finalists), initial=self.seconds)
        fitting = [c for c, total in zip(finalists, list(totals)[1:], strict=True) if total <= self.wish.seconds]
        self.out_of_time |= len(fitting) < len(finalists)
        return fitting

    def lacks_final_trial(self, candidate: Candidate) -> bool:
        """Whether time ran out before one of the best of the first looks was measured on all rows."""
        best = self.rank_measured_feasible_first(self.quick_trials, SLACK)[:FINALISTS]
        return self.out_of_time and candidate in best and candidate not in self.finals

    def _planned_seconds(self, plans: Mapping[Candidate, Plan]) -> dict[Candidate, float]:
        seconds = self.journal.first_planned_seconds({c: p.seconds for c, p in plans.items()})
        self._planned |= seconds
        return seconds

    @property
    def _actual_to_planned_seconds(self) -> float:
        """Seconds of a candidate for each that was planned, by those that were measured; plans know no other load."""
        measured = [c for c, t in self.quick_trials.items() if c in self._planned and not t.refused]
        planned = sum(self._planned[c] for c in measured)
        return max(1.0, sum(self.quick_trials[c].seconds for c in measured) / planned) if planned else 1.0

    def _plan(self, candidate: Candidate) -> Plan | None:
        """Plan of a candidate; None of one that is refused, which is noted."""
        try:
            return self.trials.plan(candidate)
        except Reject as rejection:
            self.quick_trials[candidate] = Trial(refused="; ".join(d.message for d in rejection.diagnostics))
            return None

    def _known_or_measured_quick_trial(self, candidate: Candidate, plan: Plan | None) -> Trial:
        if candidate not in self.quick_trials and plan is not None:
            self.quick_trials |= self._read_or_measure_trials({candidate: plan}, QUICK_ROWS)
            self.trials.keep_artifacts(
                self.rank_measured_feasible_first(self.quick_trials, SLACK)[: max(FINALISTS, FRONT)]
            )
        return self.quick_trials[candidate]

    def _progress_text(self) -> str:
        """Time that is left, and the best candidate so far."""
        left = duration_text(max(0.0, self.wish.seconds - self.seconds))
        best = self.best
        return f"{left} left, best so far {best.name}" if best else f"{left} left"

    @property
    def best(self) -> Candidate | None:
        """The best candidate so far that keeps all bounds."""
        trials = self.finals or self.quick_trials
        first = next(iter(self.rank_measured_feasible_first(trials)), None)
        return None if first is None or self.worst_bound_violation(trials[first]) else first

    def trial_text(self, trial: Trial) -> str:
        """`decode.p50 0.182, perplexity(text.choose) 1.013 of the original`."""
        if trial.refused:
            return f"refused: {trial.refused}"
        return ", ".join(f"{n} {trial.ratio_to_original(n):.3g}" for n in trial.values) + " of the original"

    def _with_overhead(self, trials: Mapping[Candidate, Trial]) -> dict[Candidate, Trial]:
        """The trials, each with its part of the time beside them: plans, and measurements of the original."""
        lap_end = self.trials.clock_seconds()
        overhead = max(0.0, lap_end - self._lap_start - sum(t.seconds for t in trials.values())) / len(trials)
        self._lap_start = lap_end
        return {c: replace(t, overhead=overhead) for c, t in trials.items()}

    def _read_or_measure_trials(self, plans: Mapping[Candidate, Plan | None], num_rows: int) -> dict[Candidate, Trial]:
        """Trials of candidates, those that the journal has as they are."""
        trials = {c: trial for c in plans if (trial := self.journal.read_trial(c, num_rows)) is not None}
        if trials:
            self._lap_start = self.trials.clock_seconds()  # a search that goes on plans again, and decides the same
        if missing := {c: plan or self.trials.plan(c) for c, plan in plans.items() if c not in trials}:
            first = f"candidate {len(self.quick_trials) + 1}: {next(iter(missing)).name}"
            with announcing_stage(first if num_rows else count_text(len(missing), "finalist"), self._progress_text()):
                trials |= self._with_overhead(self.trials.measure(missing, num_rows))
            raise_if_stopped()  # what a signal breaks off may look refused
            self.journal.store_trials({c: trials[c] for c in missing}, num_rows)
        for candidate, trial in trials.items():
            self.wish.session.settings.on_event(Said(f"{candidate.name}: {self.trial_text(trial)}"))
        return trials


def disk_bytes(plan: Plan) -> int:
    """Planned size of what a plan emits."""
    return sum(e.disk_bytes for e in plan.emissions)


def _duration_class(seconds: float) -> int:
    """Class of a duration: within one the smaller artifacts come first."""
    return round(math.log2(max(seconds, 1.0)) / 2)

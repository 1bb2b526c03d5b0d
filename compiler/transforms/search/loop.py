"""The greedy loop: until enough is saved, choose a cut, make it, remember it."""

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ....dsl.checker.value_text import value_text
from ....dsl.checker.values import DataRef, MetricRef, references_in
from ....dsl.syntax.diagnostics import Reject
from ...core.deadline import DeadlineExceeded, EarlyStop
from ...core.device import memory_budget_bytes_on
from ...core.events import Event, Listener, Pruned, Said, Ticked, Warned, listening_with
from ...core.journal import Journal
from ...core.quantity import count_text, si_count, size_text
from ...core.warned import far_beyond
from ...inputs.data.generated import Generated
from ...models.rows.forward import evaluating, memory_batches, not_a_number, outputs
from ...models.rows.packed_inputs import can_generate_from_ids_alone
from ..editing.dry_run import frees_nothing, layer_needed
from .budget import CUTS, Budget
from .candidate import Candidate, Cut, JointCandidate, Pool
from .choice import CutStrategy, Round
from .overfit import OverfitCheck, ScoreRowsCheck
from .prefix import Prefix
from .reach import affordable_candidates
from .reconstruct import Moments
from .refusals import SCORE_HELP, no_candidate_diagnostic, no_finite_score, saved_less
from .remote_candidates import ScoringWorker, score_key, scoring_task
from .score_estimates import estimate_scores_by_gradients
from .unpadded import unpadded_rows_by_length

if TYPE_CHECKING:
    from ...ir.program import Program
    from ...plugin.context import Context

_UNCUT = (layer_needed, frees_nothing)
_HONEST = 0.98  # of what was promised: parts that two branches share are counted with each
JOINTLY = 1.2  # of what cuts cost each alone that they may cost together


class Search:
    """Runs of the loop over one program that share a journal and what layers gave.

    layers_run     layer forwards, one being one layer over all rows of the metric
    layers_naive   what scoring every candidate by a whole forward would have run
    """

    def __init__(self, program: "Program", ctx: "Context"):
        self.program, self.ctx = program, ctx
        self.limit: Budget | None = None  # the goal of all turns, beyond which nothing may go far
        self.journal = Journal(ctx.workdir / "scores.jsonl")
        self.prefixes: dict[MetricRef, Prefix] = {}
        self.scored_by: MetricRef | None = None  # what the last cut was scored by
        self.saved: dict[str, float] = {}
        self.budget_of = ""
        self.cuts: list[Cut] = []
        self.rejected: dict[str, str] = {}  # places that can't be cut -> why
        self.size = _parameters(program)
        self.overfit: OverfitCheck | None = None
        self.rows: list[ScoreRowsCheck] = []  # of every metric that has decided
        self.scored, self.layers_naive, self.bytes_stored = 0, 0, 0
        self.layers_other, self.layers_ranking = 0.0, 0.0  # outside of prefixes; of them for ranking and refitting
        self.stopped, self._spent = False, 0.0  # whether the time was over; seconds of scoring

    @property
    def layers_run(self) -> float:
        remote = self.ctx.remote_scorer.work if self.ctx.remote_scorer else 0.0
        return self.layers_other + remote + sum(p.layers_run for p in self.prefixes.values())

    def cut_until_met(self, pools: Sequence[Pool], metric: MetricRef, budget: Budget, strategy: CutStrategy) -> None:
        """Cut until the budget is met or nothing may go any more. Every score is journalled: a killed run goes on."""
        self._forget_prefixes_but(metric)
        if not budget.is_met(self.saved.get(budget.of, 0.0)):
            self.rows.append(ScoreRowsCheck(metric))
            self.rows[-1].warn_if_too_few_tokens(self)
        while not budget.is_met(saved := self.saved.get(budget.of, 0.0)):
            if self.overfit and not self.ctx.task_source:  # a worker looks at nothing but what it is asked
                self.overfit.measure_and_record_if_due(self, saved, metric)
            pairs = [(pool, c) for pool in pools for c in pool.candidates() if c.location not in self.rejected]
            if not pairs:
                return
            if not strategy.scores_all:
                pairs = affordable_candidates(pairs, pools, saved, budget, self.limit)
            try:
                self._decide_and_cut(pairs, metric, budget, strategy)
            except DeadlineExceeded:
                self._record_early_stop_or_reject(len(pairs), budget)
                return

    def _record_early_stop_or_reject(self, candidate_count: int, budget: Budget) -> None:
        """Leave it at the cuts that were made. Raises Reject (no-time) where there are none."""
        if not self.cuts:
            raise self.too_short_rejection(candidate_count)
        deadline, of = self.ctx.run.deadline, budget.of
        assert deadline, "nobody said how long a search may take"
        share = "" if of == CUTS else f", {self.saved[of] / budget.total:.1%} of {of}"
        reached = f"{count_text(len(self.cuts), 'cut')}{share} of {budget.goal / budget.total:.1%}"
        deadline.stop = EarlyStop(reached, {"cuts": len(self.cuts)})
        self.stopped = True
        self.ctx.emit_event(Said(f"search: the time is over after {reached}"))

    def too_short_rejection(self, candidate_count: int) -> Reject:
        """For the time that was given, where not even the first of so many candidates could be chosen."""
        deadline = self.ctx.run.deadline
        assert deadline, "nobody said how long a search may take"
        each = self._spent / self.scored if self.scored else deadline.allowed
        return deadline.too_short_rejection("one cut", max(1, candidate_count - self.scored) * each)

    def collect_and_store_moments(
        self, moments: Moments, module_paths: Sequence[str], metric: MetricRef, data: DataRef | None, max_bytes: int
    ) -> None:
        """Second moments of what modules are given, over the data's rows.

        Without data they are rows that the original writes itself: they speak for all that it was trained on, and
        keep what is fitted on them apart from what is scored on the metric's. A model that writes nothing has the
        metric's rows for both.
        """
        self.current_score(metric)  # a model that has no score is told so, before it writes nonsense
        rows = unpadded_rows_by_length(self.ctx, data) if data else self._generated_rows()
        label = data.name if data else "what the model writes"
        run = partial(self._model_score_or_reject, metric) if rows is None else partial(self._run_on_rows, rows, label)
        with self.ctx.run.interruptible_search():
            runs = moments.collect_missing_and_count_passes(self.program, module_paths, run, max_bytes)
        if rows is not None and data is None:
            runs += 1  # a token that is written goes through every layer once
        cost = runs * len(self.program.units) * (1.0 if rows is None else self._tokens_per_metric_token(rows, metric))
        self.layers_other, self.layers_ranking = self.layers_other + cost, self.layers_ranking + cost

    def _generated_rows(self) -> list[Tensor] | None:
        """None where the model is none that writes, or writes of what it hears alone."""
        if not can_generate_from_ids_alone(self.program.model):
            return None
        return [torch.stack(list(Generated.fitting(self.ctx.origin).rows(self.ctx.tokenizer, self.ctx)))]

    def _tokens_per_metric_token(self, rows: Sequence[Tensor], metric: MetricRef) -> float:
        """Number of tokens of some rows per token that the metric reads."""
        scored = sum(self.ctx.rows(ref).numel() for ref in references_in(dict(metric.args), DataRef))
        return sum(part.numel() for part in rows) / scored if scored else 1.0

    def _run_on_rows(self, rows: Sequence[Tensor], label: str) -> None:
        """Run the model over rows."""
        model = self.program.model
        with evaluating(model):
            for batch in self.ctx.each([b for part in rows for b in memory_batches(model, part)], f"reading {label}"):
                outputs(model, batch)

    def finish_cuts_and_record_cost(self, pools: Sequence[Pool]) -> None:
        """Make the cuts real and say what the search cost.

        The cost is said, not noted: a run that was killed and went on has another one, and the same result.
        """
        if self.overfit and self.cuts:
            assert self.scored_by is not None, "cuts that nothing scored"
            self.overfit.measure_and_record_if_due(self, self.saved[self.budget_of], self.scored_by, is_last=True)
            self.overfit.note_and_warn_if_overfit(self)
        for pool in pools:
            pool.finish()
        self._refuse_less_saved_than_estimated()
        peak_bytes = max([self.bytes_stored, *(p.bytes_stored for p in self.prefixes.values())])
        self.ctx.record("layer forwards", self.layers_run)
        self.ctx.record("layer forwards to rank and refit", self.layers_ranking)
        self.ctx.record("layer forwards, were every candidate scored by the whole model", self.layers_naive)
        self.ctx.record("layer outputs kept", peak_bytes, "B")
        share = self.layers_run / self.layers_naive if self.layers_naive else 0.0
        self.ctx.emit_event(
            Said(
                f"search: {count_text(len(self.cuts), 'cut')}, {si_count(round(self.layers_run))} layer forwards, "
                f"{share:.0%} of "
                f"{si_count(self.layers_naive)} for whole models; {size_text(peak_bytes)} of outputs kept"
            )
        )

    def warn_if_overshot(self, goal: Budget) -> None:
        """Warn where far more went than was asked for: parts that could go were that large."""
        saved = self.saved.get(goal.of, 0.0)
        if self.cuts and goal.is_beyond(saved):
            share, allowed = f"{saved / goal.total:.1%} of {goal.of}", f"{goal.goal / goal.total:.1%}"
            last = f"{self.cuts[-1].name}, the last cut, is that large"
            self.ctx.emit_event(Warned(far_beyond(f"{share} went where {allowed} was to: {last}")))

    def _refuse_less_saved_than_estimated(self) -> None:
        """Reject what left the model larger than all cuts together should have."""
        promised, removed = self.saved.get("params", 0.0), self.size - _parameters(self.program)
        if removed < _HONEST * promised:
            fact = f"the search counted on {si_count(round(promised))} parameters less, and {si_count(removed)} went"
            remedy = "cut other kinds of parts, or leave out with `on:` what does not become smaller"
            raise saved_less(fact, help=remedy).rejection()

    def current_score(self, metric: MetricRef) -> float:
        """The score of the model as it is."""
        if self.scored_by == metric:
            return self.cuts[-1].score
        key = f"{len(self.cuts)}:{value_text(metric)}"
        return self.journal.get_or_compute(key, lambda: self._timed_score(None, metric))

    def measure_journalled(self, journal_key: str, metric: MetricRef) -> float:
        """A metric of the model as it is, by whole forwards, journalled."""

        def measure() -> float:
            scored = [self.ctx.rows(ref) for ref in references_in(dict(metric.args), DataRef)]
            forward_weight = self._tokens_per_metric_token(scored, self.scored_by or metric) if scored else 1.0
            self.layers_other += len(self.program.units) * forward_weight
            return self._measure(metric)

        return self.journal.get_or_compute(f"{journal_key} {value_text(metric)}", measure)

    def _decide_and_cut(
        self, pairs: list[tuple[Pool, Candidate]], metric: MetricRef, budget: Budget, strategy: CutStrategy
    ) -> None:
        number, kinds = len(self.cuts), {c.name: pool.kind for pool, c in pairs}
        round_ = Round(
            [c for _, c in pairs],
            lambda: self.current_score(metric),
            lambda requested: self._score_candidates(number, round_, requested, metric, budget),
            1.0 if self.ctx.metric(metric).better == "lower" else -1.0,
            budget.goal - self.saved.get(budget.of, 0.0),
            self._prefetch,
        )
        if self.ctx.task_source:
            strategy = ScoringWorker(self.ctx.task_source, number, lambda: self.layers_run)
        self.rows[-1].remember_baseline(self)
        if not self.cuts or self.scored_by != metric:
            strategy.take_forecast(partial(estimate_scores_by_gradients, self, number, round_.candidates, metric))
        while (best := strategy.score_and_choose(round_)) is not None:
            group, score = self._choose_joint_or_single_cut(number, round_, best, strategy, metric)
            names = [c.name for c in group]  # before the cut: they say what is left
            if first := self._cut_or_exclude(best, round_, budget):
                break
        else:
            raise no_candidate_diagnostic(
                round_, self.rejected, budget.of, self.saved.get(budget.of, 0.0) / budget.total
            ).rejection()
        saves = [first, *(self._cut_or_exclude(c, round_, budget) for c in group[1:])]
        assert all(saves), f"{names} were scored together, and not all can be cut"
        self.layers_naive += len(pairs) * len(self.program.units) * len(group)
        self.scored_by, self.budget_of = metric, budget.of
        for name, each in zip(names, saves, strict=True):
            for of, value in each.items():
                self.saved[of] = self.saved.get(of, 0.0) + value
            scores, second = (round_.scores, round_.runner_up(name)) if name == names[0] else ({}, None)
            cut = Cut(name, kinds[name], score, second, scores, self.saved[budget.of], budget.total)
            self._record_cut(cut, metric, strategy.pop_facts(round_) | ({"together": names} if len(names) > 1 else {}))
        self.rows[-1].warn_once_if_score_improves(self, score)
        self.ctx.emit_event(Pruned(names[-1]))

    def _choose_joint_or_single_cut(
        self, cut_index: int, round_: Round, best: Candidate, strategy: CutStrategy, metric: MetricRef
    ) -> tuple[list[Candidate], float]:
        """Removed candidates, and the score: the best, and others with it where that costs no more than expected."""
        companions = strategy.joint_companions_and_growths(round_, best)
        single = [best], round_.scores[best.name]
        if not companions:
            return single
        joint = JointCandidate((best, *(c for c, _ in companions)), list(self.program.units))
        score = self.journal.get_or_compute(f"{cut_index}:{joint.name}", lambda: self._timed_score(joint, metric))
        base = round_.sign * self.current_score(metric)
        expected = round_.sign * round_.scores[best.name] - base + sum(growth for _, growth in companions)
        accepted = math.isfinite(score) and round_.sign * score - base <= JOINTLY * max(expected, 0.0)
        strategy.adapt_joint_count(accepted)
        return ([*joint.members], score) if accepted else single

    def _record_cut(self, cut: Cut, metric: MetricRef, extra_facts: dict[str, Any]) -> None:
        self.cuts.append(cut)
        self.ctx.record(f"cut {len(self.cuts)}: {cut.name}", cut.score)
        self.program.note(
            cut=cut.name,
            kind=cut.kind,
            score=cut.score,
            runner_up=cut.runner_up,
            by=metric.name,
            saved=round(cut.saved),
            share=round(cut.saved / cut.total, 6),
            scores={n: float(f"{s:.6g}") if math.isfinite(s) else None for n, s in cut.scores.items()},
            **extra_facts,
        )

    def _cut_or_exclude(self, candidate: Candidate, round_: Round, budget: Budget) -> dict[str, float] | None:
        """Cut a candidate, and say what it saved; what the model does not run without stays, and is none to choose."""
        units = list(self.program.units)  # before the cut
        saves = {of: 1.0 if of == CUTS else candidate.saves(of) for of in {"params", "flops", budget.of}}
        layer = units.index(candidate.unit) if candidate.unit in units else 0
        try:
            candidate.cut()
        except Reject as rejection:
            if any(d.fault not in _UNCUT for d in rejection.diagnostics):
                raise
            self.exclude_location(candidate.location, rejection.diagnostics[0].message)
            round_.candidates = [c for c in round_.candidates if c is not candidate]
            return None
        for prefix in self.prefixes.values():
            prefix.forget_outputs_from(layer)
        return saves

    def exclude_location(self, location: str, reason: str) -> None:
        """Take a place out of the search, for good and with a reason."""
        self.rejected[location] = reason
        self.program.note(left=location, why=reason)
        self.ctx.emit_event(Said(f"search: {location} stays: {reason}"))

    def _score_candidates(
        self, cut_index: int, round_: Round, candidates: Sequence[Candidate], metric: MetricRef, budget: Budget
    ) -> list[float]:
        """Scores of candidates, of which none depends on another: workers compute them at once."""
        if len(candidates) > 1:
            self._prefetch(candidates)
        for candidate in candidates:
            round_.scores[candidate.name] = self._score_with_progress(cut_index, round_, candidate, metric, budget)
        return [round_.scores[candidate.name] for candidate in candidates]

    def _score_with_progress(
        self, cut_index: int, round_: Round, candidate: Candidate, metric: MetricRef, budget: Budget
    ) -> float:
        """A candidate's score; progress is how much of the budget is saved, and what is best so far."""
        finite = {n: round_.sign * s for n, s in round_.scores.items() if math.isfinite(s)}
        best = min(finite, key=finite.__getitem__, default=None)
        done = min(self.saved.get(budget.of, 0.0) / budget.goal, 1.0)
        left = f"{len(round_.candidates) - len(round_.scores)} of {len(round_.candidates)} candidates left"
        left += f", {count_text(self.ctx.remote_scorer.size, 'worker')}" if self.ctx.remote_scorer else ""
        note = f"{left}, best {best}: {round_.scores[best]:.4g}" if best else left
        tick = Ticked(f"cut {cut_index + 1}, % of the budget", round(100 * done), 100, note)
        self.ctx.tick(tick)
        key, measure = score_key(cut_index, candidate), partial(self._timed_score, candidate, metric)
        with listening_with(partial(_within, tick, self.ctx.tick)):
            if self.ctx.remote_scorer:
                with self.ctx.run.interruptible_search():
                    task = scoring_task(self.cuts, candidate)
                    return self.ctx.remote_scorer.value_from_workers(self.journal, key, task, measure)
            return self.journal.get_or_compute(key, measure)

    def _prefetch(self, candidates: Sequence[Candidate]) -> None:
        if self.ctx.remote_scorer:
            number = len(self.cuts)
            self.ctx.remote_scorer.prefetch(
                self.journal, {score_key(number, c): scoring_task(self.cuts, c) for c in candidates}
            )

    def _timed_score(self, removed: Candidate | JointCandidate | None, metric: MetricRef) -> float:
        """A candidate without which the model gives no finite score is no candidate: NaN."""
        started = time.monotonic()
        with self.ctx.run.interruptible_search():
            value = self._measure_score_or_nan(removed, metric)
        self.scored, self._spent = self.scored + 1, self._spent + time.monotonic() - started
        return value

    def _measure_score_or_nan(self, removed: Candidate | JointCandidate | None, metric: MetricRef) -> float:
        prefix = self.prefix_of(metric)
        run = partial(self._measure, metric)
        if removed is None:
            return prefix.measure_from(partial(self._model_score_or_reject, metric))
        try:
            return prefix.measure_from(run, removed.unit, removed.applied)
        except Reject as rejection:
            if any(d.fault is not not_a_number for d in rejection.diagnostics):
                raise
            return math.nan

    def _measure(self, metric: MetricRef) -> float:
        return self.ctx.metric(metric).measure(self.program.model, self.ctx)

    def _model_score_or_reject(self, metric: MetricRef) -> float:
        """The score of the model as it is; where it has none, no candidate has."""
        try:
            return self._measure(metric)
        except Reject as rejection:
            if any(d.fault is not not_a_number for d in rejection.diagnostics):
                raise
            raise no_finite_score(
                f"the model as it is has a {value_text(metric)} of NaN or infinity", help=SCORE_HELP
            ).rejection() from rejection

    def _forget_prefixes_but(self, metric: MetricRef) -> None:
        """Drop the stored outputs of layers for metrics no longer in use."""
        for other in [m for m in self.prefixes if m != metric]:
            self.layers_other += self.prefixes[other].layers_run
            self.bytes_stored = max(self.bytes_stored, self.prefixes.pop(other).bytes_stored)

    def prefix_of(self, metric: MetricRef) -> Prefix:
        """Stored outputs of the layers for a metric, shared by all its measurements."""
        if metric not in self.prefixes:
            settings = self.ctx.settings
            self.prefixes[metric] = Prefix(self.program, memory_budget_bytes_on(settings.device, settings.max_memory))
        return self.prefixes[metric]


def _within(tick: Ticked, listener: Listener, event: Event) -> None:
    """Tell where the many batches of one candidate are as part of what goes on; one batch hides nothing."""
    if not isinstance(event, Ticked):
        listener(event)
    elif event.total > 1:
        listener(Ticked(tick.label, tick.done, tick.total, f"{tick.note}, {event.label} {event.done}/{event.total}"))


def _parameters(program: "Program") -> int:
    return sum(p.numel() for p in program.model.parameters())

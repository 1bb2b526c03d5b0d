"""Candidates measured: their steps run through the cache, their artifact written, opened and compared."""

import math
import shutil
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ....dsl.checker.recipe import Bound, Recipe
from ....dsl.checker.values import DataRef, MetricRef
from ....dsl.syntax.diagnostics import Reject
from ...analysis.planning.plan import Plan, plan_pipeline
from ...artifacts.load import load_to_judge
from ...core.cache import Cache
from ...core.events import StageBegan
from ...evaluation.confidence import median_interval
from ...evaluation.timing import InterleavedTimes, measure_interleaved, measure_single
from ...plugin.clock import reason_not_timed
from ...plugin.context import Context
from ...transforms.editing.rehearsed import load_or_discover_skeleton
from ..judging.comparison import cached_original_values, store_original_values
from ..judging.gate import BoundVerdict, judge_bound
from ..judging.scores import measure_score
from ..pipeline import Build
from .alternatives import Candidate
from .wish import Wish, metric_on_data

QUICK_ROWS = 8  # rows of a first measurement
ROUNDS = 6  # of timings at least; PRECISION is the width of a ratio's interval at which they end
PRECISION = 0.10
Times = tuple[tuple[float, float], tuple[float, float]]  # (result, original), and the interval of their ratio
QUICK_SECONDS, PRECISE_SECONDS = 2.0, 8.0  # at most, of a first measurement and of one on all rows


@dataclass(frozen=True)
class Trial:
    """Measurement of a candidate.

    values    (result, original) by the metric's text in the recipe; empty where the candidate was refused
    rows      of a first look, or 0 for all
    seconds   it took
    overhead  seconds of a search between the trial before and this one, and of measuring the original beside it
    refused   why there is no measurement
    ranges    95 % intervals of result by original, of what is timed
    """

    values: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    rows: int = 0
    seconds: float = 0.0
    overhead: float = 0.0
    refused: str = ""
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def ratio_to_original(self, metric: str) -> float:
        """Result by original; the result where the original is 0."""
        value, original = self.values[metric]
        return value / original if original else value


class OpenedModel(NamedTuple):
    """A candidate that is ready to be measured, and the seconds that building and opening it took."""

    model: Any
    seconds: float


class TrialArtifact(NamedTuple):
    """Folder of an artifact, and the first form in it, which is the one that is opened."""

    folder: Path
    first_form: str


@dataclass(frozen=True)
class Trials:
    """Measurements of candidates of a wish; `folder` is for their artifacts, which `measure` leaves for a second look.

    artifacts   those that were written
    """

    wish: Wish
    cache: Cache
    folder: Path | None = None  # plans alone, no measurements
    artifacts: dict[Candidate, TrialArtifact] = field(default_factory=dict)

    @cached_property
    def metrics(self) -> dict[str, MetricRef]:
        """Metrics of the bounds and the objectives, by their text on the rows that candidates are measured on."""
        refs = (*(b.metric for b in self.wish.bounds), *self.wish.objectives)
        return {self.wish.metric_text_on_choose_rows(ref): ref for ref in refs}

    def plan(self, candidate: Candidate) -> Plan:
        """Plan of a candidate's recipe. Raises Reject for one that the model or the target refuses."""
        session = self.wish.session_with_text(self.recipe_text(candidate))
        (recipe,) = session.recipes(resolve=True)
        pipeline = recipe.pipelines[self.wish.pipeline.name]
        ctx = session.context(recipe, pipeline)
        return plan_pipeline(recipe, pipeline, ctx, load_or_discover_skeleton(ctx.origin, session.settings))

    def plan_or_none(self, candidate: Candidate) -> Plan | None:
        """Plan of a candidate, None of one that is refused."""
        try:
            return self.plan(candidate)
        except Reject:
            return None

    def recipe_text(self, candidate: Candidate, suffix: str = "") -> str:
        return self.wish.text_with_step_replaced(
            candidate.steps(self.wish.data.name), candidate.numbers.arguments, suffix
        )

    def measure(self, plans: Mapping[Candidate, Plan], num_rows: int) -> dict[Candidate, Trial]:
        """Measure candidates on `num_rows` rows of `choose`, 0 for all; what is timed takes turns, the original too.

        Of a candidate that can't be built or measured the trial says why.
        """
        trials: dict[Candidate, Trial] = {}
        opened: dict[Candidate, OpenedModel] = {}
        for candidate, plan in plans.items():
            started = time.monotonic()
            try:
                model = self._write_and_load_artifact(candidate, self._plan_with_bound_on_each_metric(plan, num_rows))
            except Reject as rejection:
                message = "; ".join(d.message for d in rejection.diagnostics)
                trials[candidate] = Trial(seconds=time.monotonic() - started, refused=message)
            else:
                opened[candidate] = OpenedModel(model, time.monotonic() - started)
        if opened:
            trials |= self._trials_beside_original(
                opened, self._plan_with_bound_on_each_metric(next(iter(plans.values())), num_rows), num_rows
            )
        return trials

    def _plan_with_bound_on_each_metric(self, plan: Plan, num_rows: int) -> Plan:
        """The plan with a bound on each metric, on rows to choose by: what those metrics compare with is kept."""
        recipe, short = _recipe_with_first_rows(self.wish, plan.recipe, num_rows)
        bounds = tuple(
            Bound(metric_on_data(ref, short), "<=", math.inf, baseline=plan.pipeline.model)
            for ref in self.metrics.values()
        )
        return replace(plan, recipe=recipe, pipeline=replace(plan.pipeline, expects=bounds))

    def clock_seconds(self) -> float:
        """Seconds by which the time of a search is counted."""
        return time.monotonic()

    def keep_artifacts(self, candidates: Collection[Candidate]) -> None:
        """Remove the artifacts of all other candidates."""
        for candidate in self.artifacts.keys() - set(candidates):
            shutil.rmtree(self.artifacts.pop(candidate).folder, ignore_errors=True)

    def _write_and_load_artifact(self, candidate: Candidate, plan: Plan) -> Any:
        """The artifact of a candidate, written unless it is there, and opened."""
        ctx = self.wish.session.context(plan.recipe, plan.pipeline)
        if candidate not in self.artifacts:
            self.artifacts[candidate] = self._build_and_write_artifact(plan, ctx)
        artifact = self.artifacts[candidate]
        return load_to_judge(artifact.folder / artifact.first_form, ctx.settings.device)

    def _build_and_write_artifact(self, plan: Plan, ctx: Context) -> TrialArtifact:
        """Run the steps of a plan, and write its artifact."""
        build = Build(plan, ctx, self.cache, total=len(plan.stages))
        for index in range(len(plan.stages)):
            build.run_step_unless_cached(plan.stages[index])
        (emit,) = [e for e in plan.pipeline.emits if e.call.word == self.wish.emit.call.word]
        outcome = build.load_outcome(plan.key_of(emit.source))
        if outcome.program is not None:
            outcome.program.to_cpu()
        writer = ctx.registry.make("target", emit.call)
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            writer.write(outcome, folder, ctx)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        forms = [form.folder for form in writer.forms_of(outcome) if (folder / form.folder).is_dir()]
        build.results.release()
        return TrialArtifact(folder, forms[0])

    def _trials_beside_original(
        self, opened: Mapping[Candidate, OpenedModel], plan: Plan, num_rows: int
    ) -> dict[Candidate, Trial]:
        """Trials of opened models beside the original."""
        ctx = self.wish.session.context(plan.recipe, plan.pipeline)
        ctx.emit_event(StageBegan("tune", "measuring"))
        original = ctx.origin.load().eval()
        refs = dict(zip(self.metrics, (b.metric for b in plan.pipeline.expects), strict=True))
        known = cached_original_values(plan, self.cache, ctx)
        rejected: dict[Candidate, str] = {}
        values: dict[Candidate, dict[str, tuple[float, float]]] = {candidate: {} for candidate in opened}
        ranges: dict[Candidate, dict[str, tuple[float, float]]] = {candidate: {} for candidate in opened}
        seconds = {candidate: entry.seconds for candidate, entry in opened.items()}
        for text, ref in refs.items():
            metric, key = ctx.metric(ref), (plan.pipeline.model, ref)
            if metric.timed:
                continue
            if key not in known:
                known[key] = measure_score(metric, original, ctx)
            for candidate, entry in opened.items():
                started = time.monotonic()
                try:
                    values[candidate][text] = measure_score(metric, entry.model, ctx).value, known[key].value
                except Reject as rejection:  # logits that are no numbers
                    rejected[candidate] = "; ".join(d.message for d in rejection.diagnostics)
                seconds[candidate] += time.monotonic() - started
        store_original_values(known, {}, plan, self.cache, ctx)
        for text, ref in refs.items():
            models = {c.name: entry.model for c, entry in opened.items() if c not in rejected}
            if ctx.metric(ref).timed and models:
                started = time.monotonic()
                limit = QUICK_SECONDS if num_rows else PRECISE_SECONDS
                timed, untimed = relative_times_and_refusals(original, models, ctx.metric(ref), limit)
                rejected |= {c: untimed[c.name] for c in opened if c.name in untimed}
                for candidate in (c for c in opened if c.name in timed):
                    values[candidate][text], ranges[candidate][text] = timed[candidate.name]
                    seconds[candidate] += (time.monotonic() - started) / len(models)
        return {
            c: Trial(rows=num_rows, seconds=seconds[c], refused=rejected[c])
            if c in rejected
            else Trial(values[c], num_rows, seconds[c], ranges=ranges[c])
            for c in opened
        }


def relative_times_and_refusals(
    original: Any, models: Mapping[str, Any], metric: Any, max_seconds: float
) -> tuple[dict[str, Times], dict[str, str]]:
    """Times beside the original's by model, and the reasons of models that can't be timed. Raises Reject where the
    original can't, or this machine has no runtime to time with."""
    try:
        return relative_times(original, models, metric, max_seconds), {}
    except Reject as rejection:
        if reason_not_timed(rejection):
            raise
        measure_single(metric.clock(original), original)
    rejected = {}
    for name, model in models.items():
        try:
            measure_single(metric.clock(model), model)
        except Reject as rejection:
            rejected[name] = "; ".join(d.message for d in rejection.diagnostics)
    measurable = {name: model for name, model in models.items() if name not in rejected}
    return relative_times(original, measurable, metric, max_seconds) if measurable else {}, rejected


def relative_times(original: Any, models: Mapping[str, Any], metric: Any, max_seconds: float) -> dict[str, Times]:
    """(result, original) of a timed metric for models that take turns with the original, and the ratio's interval.

    A result is the original's median times the median of the ratios within rounds. Rounds go on until every ratio is
    known to PRECISION, or for so many seconds.
    """

    def ratios(timing: InterleavedTimes, name: str) -> list[float]:
        return [r[name] / r["original"] for r in timing.rounds]

    def precise(timing: InterleavedTimes) -> bool:
        intervals = [median_interval(ratios(timing, name)) for name in models]
        return all(i is not None and i[1] <= i[0] * (1 + PRECISION) for i in intervals)

    timing = measure_interleaved(
        {"original": original, **models},
        metric,
        rounds=ROUNDS,
        is_decided=precise,
        min_seconds=max_seconds,
        calls_per_round=ROUNDS,
    )
    middle = timing.values["original"]
    medians = {name: median(ratios(timing, name)) for name in models}
    return {
        name: ((middle * ratio, middle), median_interval(ratios(timing, name)) or (ratio, ratio))
        for name, ratio in medians.items()
    }


def judge_trial(wish: Wish, trial: Trial, ctx: Context) -> list[BoundVerdict]:
    """Bounds of the wish, judged by what a trial measured."""
    outcomes = []
    for bound in wish.bounds:
        value, original = trial.values[wish.metric_text_on_choose_rows(bound.metric)]
        unit = ctx.metric(bound.metric).unit
        outcomes.append(judge_bound(bound, original if bound.baseline else None, value, unit))
    return outcomes


def relative_bound_miss(verdict: BoundVerdict) -> float:
    """Share of its limit by which a value misses a bound; 0 where it keeps it."""
    if verdict.passed:
        return 0.0
    value, limits = verdict.value, [x for x in (verdict.low, verdict.high) if x is not None]
    assert value is not None, "a bound was judged without a value"
    return max(1e-9, min((abs(value - x) / max(abs(x), 1e-12) for x in limits), default=1.0))


def _recipe_with_first_rows(wish: Wish, recipe: Recipe, num_rows: int) -> tuple[Recipe, DataRef]:
    """The recipe with a data set of the first rows of `choose`, and its name."""
    call = wish.recipe.data[wish.choose.name]
    count = next((name for name in ("samples", "count") if name in call.args), "")
    if num_rows and count:
        call = replace(call, args={**call.args, count: min(num_rows, call.args[count] or num_rows)})
    name = f"the first {num_rows} rows of {wish.choose.name}" if num_rows else f"the rows of {wish.choose.name}"
    return replace(recipe, data={**recipe.data, name: call}), DataRef(name)

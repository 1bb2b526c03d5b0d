"""Bisection of a pipeline: the step, and its cut, that broke a bound, measured on cached results.

Steps are looked at from the last to the first: the culprit is the one after the last result that kept the bound, as a
later step may mend what an earlier one broke. A step that searches is then run again as far as it must: its scores are
in its notes, so nothing is scored twice, and the bound's metric is measured after every cut.
"""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...dsl.checker.recipe import Bound
from ...dsl.checker.value_text import bound_text
from ...dsl.checker.values import StepRef, references_in
from ...dsl.syntax.diagnostics import Diagnostic, Fault
from ..analysis.planning.plan import Plan, Stage
from ..core.cache import Cache
from ..core.error_location import diagnostics_located_at
from ..core.events import Event, Pruned, Said
from ..core.journal import Journal
from ..core.quantity import measurement_text
from ..plugin.context import Context
from .judging.comparison import measure_beside_original
from .judging.gate import BoundVerdict, Known, measure_and_judge_bounds, metric_label
from .pipeline import Build

broken_by = Fault(
    "broken-by",
    "`effc bisect` found the step, or the cut, after which a bound is missed.\n\n"
    "The result of the step before keeps the bound. Ask less of the step, or give it what it scores by on other data.",
    exit="gate",
)
original_misses = Fault(
    "original-misses", "The model misses the bound before any step, so no step broke it.", exit="gate"
)


@dataclass(frozen=True)
class Measurement:
    """Value of the bound's metric for one result; `step` is "" for the model itself."""

    step: str
    word: str
    verdict: BoundVerdict


@dataclass(frozen=True)
class BisectResult:
    """Result of a bisection; `step` is None where the result keeps the bound, or the model itself misses it.

    looks   the results that were measured, from the model to the last one
    cuts    (name, value) after each cut of the step, up to the one that broke the bound; empty where it makes none
    """

    bound: Bound
    looks: tuple[Measurement, ...]
    step: Stage | None = None
    cuts: tuple[tuple[str, float], ...] = ()
    of: int = 0

    @property
    def diagnostics(self) -> list[Diagnostic]:
        last, text = self.looks[-1], bound_text(self.bound)
        if last.verdict.passed:
            return []
        if self.step is None:
            return [original_misses(f"the model itself misses `{text}`", self.bound.span)]
        index = next(i for i, entry in enumerate(self.looks) if entry.step == self.step.name)
        unit, name = last.verdict.unit, metric_label(self.bound)
        before, after = (_value_or_unmeasured(entry.verdict.value, unit) for entry in self.looks[index - 1 : index + 1])
        message = f"`{self.step.name}` breaks it: `{name}` is {before} before and {after} after"
        note = ""
        if self.cuts:
            cut, value = self.cuts[-1]
            note = (
                f"cut {len(self.cuts)} of {self.of} breaks it: without {cut} it is {_value_or_unmeasured(value, unit)}"
            )
        related = ((self.bound.span, f"limit {last.verdict.limit}"),) if self.bound.span else ()
        return [broken_by(message, self.step.span, note=note, related=related)]


def _value_or_unmeasured(value: float | None, unit: str) -> str:
    return "not measured" if value is None else measurement_text(value, unit)


@dataclass
class Bisection:
    """The search for one bound of one plan."""

    plan: Plan
    ctx: Context
    cache: Cache
    bound: Bound

    def run(self) -> BisectResult:
        self.build, self.known = Build(self.plan, self.ctx, self.cache), Known()
        self.build.total = len(self.plan.stages)
        for stage in self.plan.stages:
            self.build.run_step_unless_cached(stage)
        chain = self._step_chain()
        looks: list[Measurement] = []
        first = Measurement("", "", self._verdict_of_step(self.plan.identity))
        culprit = None
        for stage in reversed(chain):
            verdict = self._verdict_of_step(stage.key)
            if looks and verdict.passed:
                return self._result_with_culprit_cut(
                    [first, Measurement(stage.name, stage.call.word, verdict), *reversed(looks)], culprit
                )
            looks.append(Measurement(stage.name, stage.call.word, verdict))
            culprit = stage
            if verdict.passed:  # the result itself
                return BisectResult(self.bound, (first, looks[0]))
        ordered = [first, *reversed(looks)]
        return (
            self._result_with_culprit_cut(ordered, culprit)
            if first.verdict.passed
            else BisectResult(self.bound, tuple(ordered))
        )

    def _step_chain(self) -> list[Stage]:
        """The steps that led to the pipeline's result, in order; one that works on several ends the chain."""
        by_name = {s.name: s for s in self.plan.pipeline.steps}
        stages = {s.name: s for s in self.plan.stages}
        name, chain = self.plan.pipeline.result, []
        while name in by_name and not references_in(by_name[name].call.args, StepRef):
            chain.append(stages[name])
            name = by_name[name].source
        return chain[::-1]

    def _verdict_of_step(self, key: str) -> BoundVerdict:
        outcome = self.build.load_outcome(key)
        assert outcome.in_place and outcome.program, f"{key} gives {outcome.kind}"
        verdict = self._verdict_on_model(outcome.program.model)
        self.ctx.emit_event(
            Said(f"{metric_label(self.bound)} {_value_or_unmeasured(verdict.value, verdict.unit)}, {verdict.state}")
        )
        return verdict

    def _verdict_on_model(self, model: Any) -> BoundVerdict:
        """The bound alone on a model; of a clock beside the original, in turns."""
        pipeline = replace(self.plan.pipeline, expects=(self.bound,))
        if self.ctx.metric(self.bound.metric).timed:
            return measure_beside_original(model, replace(self.plan, pipeline=pipeline), self.cache, self.ctx).outcomes[
                0
            ]
        return measure_and_judge_bounds(pipeline, model.eval(), self.ctx, self.known)[0]

    # -- the cut ---------------------------------------------------------------------------------------------

    def _result_with_culprit_cut(self, measurements: list[Measurement], culprit: Stage | None) -> BisectResult:
        assert culprit is not None, "something broke the bound"
        body = self.cache.read_complete_step(culprit.key)
        assert body is not None, f"{culprit.name} has run"
        notes = [n for n in body["notes"].get("step", ()) if "cut" in n and "scores" in n]
        blame = BisectResult(self.bound, tuple(measurements), culprit, of=len(notes))
        if not notes or self.ctx.metric(self.bound.metric).timed:  # a cut's time is what the whole model takes
            return blame
        scores = {f"{i}:{name}": _score_or_nan(s) for i, note in enumerate(notes) for name, s in note["scores"].items()}
        cuts = self._replay_search(culprit, scores, [n["cut"] for n in notes])
        return replace(blame, cuts=tuple(cuts if cuts is not None else self._replay_search(culprit, {}, None) or ()))

    def _replay_search(
        self, stage: Stage, scores: Mapping[str, float], cut_names: list[str] | None
    ) -> list[tuple[str, float]] | None:
        """Run a search again until the bound breaks; None where it goes another way than `cut_names` say."""
        cuts: list[tuple[str, float]] = []

        def judge_cut(event: Event) -> None:
            self.ctx.emit_event(event)
            if not isinstance(event, Pruned):
                return
            if cut_names is not None and cut_names[len(cuts)] != event.name:
                raise _Done  # scores in notes are rounded, and two were the same
            assert before.program is not None
            verdict = self._verdict_on_model(before.program.model)
            cuts.append((event.name, math.nan if verdict.value is None else verdict.value))
            if not verdict.passed:
                raise _Done

        with tempfile.TemporaryDirectory(prefix="effc-bisect-") as work:
            journal = Journal(Path(work) / "scores.jsonl")
            for key, score in scores.items():
                journal.get_or_compute(key, partial(float, score))
            before = self.build.load_outcome(stage.source)
            self.build.results.release()  # what runs now is no result to go on from
            settings = replace(self.ctx.settings, on_event=judge_cut)
            ctx = replace(self.ctx.relative_to(stage.call), workdir=Path(work), settings=settings)
            try:
                with diagnostics_located_at(stage.call):
                    self.ctx.registry.make("pass", stage.call).result_of(before, ctx)
            except _Done:
                if cut_names is not None and len(cuts) < len(cut_names) and not self._last_cut_misses_bound(cuts):
                    return None
            return cuts

    def _last_cut_misses_bound(self, cuts: list[tuple[str, float]]) -> bool:
        """Whether the search ended for the bound's sake, not because it went another way."""
        from .judging.gate import judge_bound

        if not cuts:
            return False
        original = next((score.value for score in self.known.values()), None) if self.bound.baseline else None
        return not judge_bound(self.bound, original, cuts[-1][1], self.ctx.metric(self.bound.metric).unit).passed


class _Done(Exception):
    """A search has gone as far as it had to."""


def _score_or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)

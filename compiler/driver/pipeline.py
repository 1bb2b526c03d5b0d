"""The one loop: run what the cache lacks, check it, keep it, emit, verify, measure."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...dsl.checker.recipe import Emit
from ...dsl.checker.values import DataRef, MetricRef, StepRef, references_in
from ...dsl.syntax.diagnostics import Diagnostic, Fault, Reject
from ..analysis.discovery.discover import skeleton_of
from ..analysis.planning.machine_profile import (
    profile_named_by,
    refuse_other_machine_profiles,
    torch_threads_of_profile,
)
from ..analysis.planning.plan import Plan, Stage
from ..analysis.planning.shape_change import describe_change
from ..core import warned
from ..core.cache import Cache
from ..core.error_location import diagnostics_located_at
from ..core.events import Event, Listener, StageBegan, StageEnded, Warned, announcing_stage, listening_with
from ..core.memory import MemoryWatch, trim_heap
from ..core.quantity import size_text
from ..evaluation import reference, similarity
from ..evaluation.promise import OutputPromise
from ..ir.outcome import Front, Outcome
from ..ir.program import Program, ProgramVersion
from ..ir.step_results import StepResults
from ..models.rows.batch_limit import retry_with_smaller_batches_on_oom
from ..plugin.context import Context
from ..plugin.interfaces import Close, Pass
from . import unfinished_steps
from .emission import Artifact, Emission, Page
from .judging.accounting import Accounting
from .judging.verdicts import Verdicts
from .worker_team import StepScorer, Team, make_step_message

no_change = Fault(
    "no-change",
    "A step ran and left the model as it was.\n\n"
    "A recipe says what is done to a model, so a step that does nothing to it is refused: leave it out.",
)


@dataclass
class Result:
    """Result of compiling one pipeline: its artifacts and its plan."""

    plan: Plan = field(repr=False)
    artifacts: list[Artifact] = field(default_factory=list)
    reports: list[Page] = field(default_factory=list)
    seconds: float = 0.0
    stopped: list[Diagnostic] = field(default_factory=list)  # searches that had no more time

    @property
    def bound_diagnostics(self) -> list[Diagnostic]:
        """Diagnostics of bounds that were missed or left open, and warnings of those skipped or uncertain."""
        of = (*(emitted.missed for emitted in self.artifacts), *(emitted.missed for emitted in self.reports))
        return [d for missed in of for d in missed]

    @property
    def missed(self) -> list[Diagnostic]:
        """Diagnostics of the bounds that were missed or left open."""
        return [d for d in self.bound_diagnostics if d.severity == "error"]


@dataclass
class Build:
    """One compile, and the results of its steps."""

    plan: Plan
    ctx: Context
    cache: Cache
    dump: str = ""  # "", "changed", "before", "after": what to say of the program at each step
    team: Team | None = None
    total: int = 0
    index: int = 0
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)  # of each step, what it took of this machine
    stopped: list[Diagnostic] = field(default_factory=list)  # searches that had no more time

    def __post_init__(self) -> None:
        self.results = StepResults(self.cache, self.ctx.origin, self.store_original_outputs)
        for stage in self.plan.stages:  # a pass imports the kind of result that it gives, which the cache is read by
            self.ctx.registry.import_plugin_class("pass", stage.call.word)

    def run(self, out_folder: Path, force: bool) -> Result:
        started = time.monotonic()
        self.total = len(self.plan.stages) + len(self.plan.pipeline.emits)
        refuse_other_machine_profiles(
            [s.call for s in self.plan.stages if not self.cache.is_step_complete(s.key)], self.ctx
        )
        for index in range(len(self.plan.stages)):  # one whose search is stopped changes the plan of those behind it
            self.run_step_unless_cached(self.plan.stages[index])
        accounting = Accounting.for_plan(self.plan, self.ctx)
        verdicts = Verdicts(self.plan, self.cache, self.ctx, accounting.on_original)
        result = Result(self.plan, stopped=self.stopped)
        emission = Emission(self.plan, self.cache, self.ctx, out_folder, force, verdicts, accounting, self.costs)
        self.write_all_targets(emission, result)
        result.seconds = time.monotonic() - started
        return result

    def write_all_targets(self, emission: Emission, result: Result) -> None:
        """Artifacts in the recipe's order, then what is about them."""
        describes = self.ctx.registry.describes_artifacts
        of: dict[str, list[Artifact]] = {}
        for target in sorted(self.plan.pipeline.emits, key=lambda e: describes(e.call.word)):
            path = str(target.call.args["path"])
            with (
                self.report_and_watch_stage(f"emit {target.call.word}", path) as done,
                self.blame_modified_files(),
                diagnostics_located_at(target.call),
            ):
                artifacts = of.setdefault(target.source, [])
                if describes(target.call.word):
                    report = emission.write_report(target, artifacts, partial(self.load_outcome_of_step, target.source))
                    result.reports.append(report)
                    done.change = size_text(report.path.stat().st_size)
                    continue
                artifacts.append(self.write_artifact(target, emission))
                result.artifacts.append(artifacts[-1])
                done.change = artifacts[-1].summary

    def run_step_unless_cached(self, stage: Stage) -> None:
        """Run one step unless its result is kept; nothing is loaded for one that is."""
        if self.cache.is_step_complete(stage.key):
            self.index += 1
            self.ctx.emit_event(StageEnded(stage.name, 0.0, cached=True))
            self.reemit_cached_warnings(stage)
            self.costs[stage.name] = {"planned": round(stage.seconds, 2), "cached": True}
            return
        with (
            self.report_and_watch_stage(stage.name, stage.call.word) as done,
            self.blame_modified_files(stage.key),
            diagnostics_located_at(stage.call),
        ):
            pass_: Pass = self.ctx.registry.make("pass", stage.call)
            unfinished_steps.prepare_step_scratch(
                self.cache, stage.key, self.ctx
            )  # before anything is loaded, where it can't be kept
            run = partial(self.run_pass_on_outcome, pass_, stage)
            result, facts = retry_with_smaller_batches_on_oom(run, self.ctx.settings.device, self.ctx.emit_event)
            stage = self.replan_if_stopped(stage)
            done.change, dump = facts["summary"], facts.pop("dump")
            done.dump = dump if self.dump else ""
            with announcing_stage("keeping the result"):
                self.results.save_outcome(stage.key, result, stage.parts, facts)
        self.costs[stage.name] = {
            "planned": round(stage.seconds, 2),
            "seconds": round(done.seconds, 2),
            "planned_bytes": stage.peak_bytes,
            "peak_bytes": done.peak,
        }

    def reemit_cached_warnings(self, stage: Stage) -> None:
        """Tell the warnings of a step whose result the cache has."""
        body = self.cache.read_complete_step(stage.key)
        assert body is not None, f"the result of {stage.name} is not in the cache"
        for diagnostic in warned.warnings_from_json(body["notes"].get("warnings", ()), stage.span):
            self.ctx.emit_event(Warned(diagnostic))

    def run_pass_on_outcome(self, pass_: Pass, stage: Stage) -> tuple[Outcome, dict[str, Any]]:
        """Result of a step, and the facts for the manifest."""
        # A pass that names the steps that it works on asks for them one at a time.
        outcome = (
            Front((), self.results) if references_in(stage.call.args, StepRef) else self.load_outcome(stage.source)
        )
        ctx = self.step_context(stage)
        self.results.release()  # from here until it is stored, the program is between steps
        warnings = Warnings(self.ctx.emit_event, stage)
        ctx = replace(ctx, settings=replace(ctx.settings, on_event=warnings))
        result, facts = self._run_and_check_pass(pass_, outcome, stage, ctx)
        result = result.with_base("" if stage.source == self.plan.identity else stage.source)
        return result, facts | {"warnings": warned.warnings_to_json(warnings.diagnostics)}

    def replan_if_stopped(self, stage: Stage) -> Stage:
        """The stage as it is planned now: a search that had no more time gave another result than was planned."""
        deadline = self.ctx.run.deadline
        stop = deadline.pop_early_stop() if deadline else None
        if deadline is None or stop is None:
            return stage
        self.plan = self.plan.with_stopped_search(stage.name, stop.facts)
        with diagnostics_located_at(stage.call):
            self.stopped.append(replace(deadline.stopped_early_diagnostic(stage.name, stop), span=stage.span))
        return next(s for s in self.plan.stages if s.name == stage.name)

    def _run_and_check_pass(
        self, pass_: Pass, outcome: Outcome, stage: Stage, ctx: Context
    ) -> tuple[Outcome, dict[str, Any]]:
        """Result of a pass, and its notes for the manifest."""
        program = outcome.program
        if not outcome.in_place or program is None:
            with torch_threads_of_profile(profile_named_by(stage.call), ctx):
                result = pass_.result_of(outcome, ctx)
            notes = result.notes or outcome.notes  # a search says of its family what it did
            return result, {"program": notes, "step": notes[-1:], "changes": [], "summary": result.summary, "dump": ""}
        before, version, noted = skeleton_of(program), program.version, len(program.notes)
        keeps = pass_.keeps
        promise = OutputPromise.of(program) if isinstance(keeps, Close) else None
        with torch_threads_of_profile(profile_named_by(stage.call), ctx):
            result = pass_.result_of(outcome, ctx)
        if result is outcome and program.version == version:
            raise no_change(
                f"`{stage.call.word}` changed nothing", help="ask more of it, or leave the step out"
            ).rejection()
        if promise and isinstance(keeps, Close):
            with announcing_stage("comparing with the model before"):
                promise.check(program, keeps)
        lines = describe_change(before, skeleton_of(program), program.notes[noted:])
        return result, {
            "program": program.notes,
            "step": program.notes[noted:],
            "changes": lines.rows,
            "summary": result.summary or lines.summary,
            "dump": lines.text,
        }

    def load_outcome_of_step(self, step_name: str) -> Outcome:
        return self.load_outcome(self.plan.key_of(step_name))

    def load_outcome(self, step_key: str) -> Outcome:
        return self.results.load_outcome(step_key)

    def store_original_outputs(self, program: Program) -> None:
        """Keep what the original says on the data that it is compared on, while it is still the original."""
        metrics = [metric for step in self.plan.pipeline.steps for metric in references_in(step.call.args, MetricRef)]
        metrics += [bound.metric for bound in self.plan.pipeline.expects]
        for ref in metrics:
            metric = self.ctx.metric(ref)
            if metric.needs_original and metric.compares == "predictions":
                for data in references_in(dict(ref.args), DataRef):
                    reference.write_reference_once(self.ctx, program.model, data)
            elif metric.needs_original:
                similarity.write_states_once(self.ctx, program.model, metric.data, metric.pooling)
        for step in self.plan.pipeline.steps:
            for data in self.ctx.registry.make("pass", step.call).originals():
                reference.write_reference_once(self.ctx, program.model, data)

    def write_artifact(self, target: Emit, emission: Emission) -> Artifact:
        outcome = self.load_outcome(self.plan.key_of(target.source))
        if outcome.program is not None:
            outcome.program.to_cpu()  # files are written from there
        artifact = emission.write_and_verify_artifact(outcome, target)
        self.results.release()
        return artifact

    def step_context(self, stage: Stage) -> Context:
        scratch = self.cache.make_checked_scratch(stage.key)
        return replace(
            self.ctx.relative_to(stage.call),
            workdir=scratch,
            results=self.results,
            step_keys={s.name: s.key for s in self.plan.stages},
            original=self.original_model(stage),
            remote_scorer=StepScorer(self.team, make_step_message(stage.name, stage.key, scratch, self.team))
            if self.team
            else None,
        )

    def original_model(self, stage: Stage) -> ProgramVersion | None:
        """The program of a step that works on the original."""
        program = self.results.outcome.program if self.results.outcome else None
        return ProgramVersion(program, program.version) if program and stage.source == self.plan.identity else None

    @contextmanager
    def blame_modified_files(self, step_key: str = "") -> "Iterator[None]":
        """Blame a file of the model that changed for whatever breaks, and drop what the step of a key left."""
        try:
            yield
        except Exception as error:
            try:
                self.ctx.origin.refuse_changed_files()
            except Reject as changed:
                if step_key:
                    unfinished_steps.remove_scratch(self.cache, step_key)
                raise changed from error
            raise
        except KeyboardInterrupt:  # which leaves no time to read files again
            if step_key and self.ctx.origin.files is not None and self.ctx.origin.files.is_touched():
                unfinished_steps.remove_scratch(self.cache, step_key)
            raise

    @contextmanager
    def report_and_watch_stage(self, name: str, description: str) -> "Iterator[Done]":
        """Tell that a stage begins and ends, how long it took and the most memory it held."""
        self.index += 1
        self.ctx.emit_event(StageBegan(name, description, self.index, self.total))
        started, done = time.monotonic(), Done()
        trim_heap()  # what the stage before freed, and the allocator kept, is not held by this one
        with MemoryWatch(self.ctx.settings.max_memory) as watch:
            self.ctx.run.watch = watch
            with listening_with(self.ctx.tick):
                yield done
        watch.refuse_exceeded_limit()
        done.seconds, done.peak = time.monotonic() - started, watch.peak
        self.ctx.emit_event(StageEnded(name, done.seconds, change=done.change, peak_bytes=done.peak, dump=done.dump))


@dataclass
class Warnings:
    """Listener of a running step: passes events on, and keeps warnings with the step's place in the recipe."""

    on_event: Listener
    stage: Stage
    diagnostics: list[Diagnostic] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Warned):
            event = Warned(event.diagnostic.at(self.stage.span))
            self.diagnostics.append(event.diagnostic)
        self.on_event(event)


@dataclass
class Done:
    """Summary of a finished stage."""

    change: str = ""
    dump: str = ""
    seconds: float = 0.0
    peak: int = 0

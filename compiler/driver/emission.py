"""From a finished program to an artifact in its place: write, reopen, measure, judge."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack

from ...dsl.checker.recipe import Emit, Recipe
from ...dsl.checker.value_text import bound_text
from ...dsl.checker.values import DataRef
from ...dsl.syntax.diagnostics import Diagnostic
from ..analysis.discovery.discover import skeleton_of
from ..analysis.planning import keys
from ..analysis.planning.layer_profile import layer_group_counts, layer_group_counts_of_packed
from ..analysis.planning.plan import Plan
from ..artifacts.artifact import artifact_draft
from ..artifacts.load import load_to_judge
from ..artifacts.manifest import Check, Expectation, Manifest
from ..artifacts.pages.report_data import ReportData
from ..artifacts.unfinished_marker import is_untouched_partial_output, write_unfinished_marker
from ..artifacts.verify import verify_forms
from ..core.cache import Cache
from ..core.events import announcing_stage
from ..core.fingerprint import machine_facts
from ..core.quantity import count_text, size_text
from ..ir.outcome import Outcome
from ..ir.program import Program
from ..plugin.context import Context
from ..plugin.target import Form, Target
from .hub import HubOptions, upload_artifact
from .judging.accounting import Accounting, RecordedLogits
from .judging.comparison import Comparison
from .judging.gate import BoundVerdict, unmet_bound_diagnostics
from .judging.verdicts import Verdicts


@dataclass(frozen=True)
class Artifact:
    """Emitted artifact: its path, its manifest and the bounds that it misses."""

    path: Path
    manifest: Manifest = field(repr=False)
    missed: tuple[Diagnostic, ...]

    @property
    def report(self) -> ReportData:
        return ReportData.of(self.path)

    @property
    def summary(self) -> str:
        checks = self.manifest.checks
        checks_text = f", {count_text(len(checks), 'check')} in fresh processes" if checks else ""
        return f"{size_text(self.manifest.bytes)}{checks_text}"

    def push_to_hub(self, repo_id: str, **options: Unpack[HubOptions]) -> str:
        """Upload the artifact to the Hugging Face hub, with its card and measures; the address of the commit.

        repo_id   `owner/name`; a repository that does not exist is created
        options   as of transformers: `private`, `token`, `revision`, `commit_message`, `create_pr`
        Raises Reject (not-uploaded) where the hub does not take it.
        """
        return upload_artifact(self.path, repo_id, **options)


@dataclass(frozen=True)
class Page:
    """A file about artifacts, and the bounds that were missed where there are none."""

    path: Path
    missed: tuple[Diagnostic, ...] = ()


@dataclass
class Emission:
    """Emission of one pipeline's artifacts: written, reopened, judged, and only then moved into place."""

    plan: Plan
    cache: Cache
    ctx: Context
    out: Path
    force: bool
    verdicts: Verdicts
    accounting: Accounting
    costs: Mapping[str, Mapping[str, Any]]  # of each step: seconds and bytes, planned and found

    def write_and_verify_artifact(self, outcome: Outcome, target: Emit) -> Artifact:
        path = self.out / target.call.args["path"]
        absolute = Path(os.path.abspath(path))
        with artifact_draft(path, self.force or is_untouched_partial_output(absolute, target.call)) as draft:
            forms = self.write(outcome, target, draft.folder)
            recorded = RecordedLogits(self.accounting, draft.folder)
            checks = self.compare_reopened_forms(outcome, draft.folder, forms, recorded)
            with announcing_stage("measuring"):
                compared, verdicts = self.measure_and_judge_bounds(outcome, target, draft.folder, forms)
            self.ctx.origin.refuse_changed_files()
            measured = self.measured_manifest(outcome, target, compared)
            manifest = draft.publish(measured.with_measures(checks=checks, accounts=recorded.make_accounts()))
        write_unfinished_marker(absolute, target.call)
        return Artifact(path, manifest, tuple(unmet_bound_diagnostics(verdicts, self.ctx.settings.undecided)))

    def write(self, outcome: Outcome, target: Emit, folder: Path) -> list[Form]:
        """Forms that the target wrote of an outcome."""
        writer: Target = self.ctx.registry.make("target", target.call)
        with announcing_stage("writing", "then reopening and measuring"):
            writer.write(outcome, folder, self.ctx)
        return [form for form in writer.forms_of(outcome) if (folder / form.folder).is_dir()]

    def compare_reopened_forms(
        self, outcome: Outcome, folder: Path, forms: list[Form], recorded: RecordedLogits
    ) -> tuple[Check, ...]:
        """Comparisons of members with what fresh processes compute from their forms; `recorded` gets both logits."""
        checks: list[Check] = []
        with announcing_stage("reopening", "then measuring"):
            for name, program in outcome.members() if forms else ():
                program.to_cpu()  # files are computed again from there
                member_forms, report_to = [f for f in forms if f.member == name], recorded.program(name, program.model)
                checks += verify_forms(
                    folder,
                    program.model,
                    member_forms,
                    seed=self.ctx.seed,
                    text_ids=recorded.text,
                    on_text_logits=report_to,
                )
        return tuple(checks)

    def write_report(self, target: Emit, artifacts: Sequence[Artifact], load_outcome: Callable[[], Outcome]) -> Page:
        """Write a file about the artifacts of a result, or about the result itself where it has none."""
        writer: Target = self.ctx.registry.make("target", target.call)
        path, reports = self.out / target.call.args["path"], [a.report for a in artifacts]
        missed: tuple[Diagnostic, ...] = ()
        if not reports:
            with announcing_stage("measuring"):
                result = load_outcome()
                compared, verdicts = self.measure_and_judge_bounds(result, target, self.out, [])
                missed = tuple(unmet_bound_diagnostics(verdicts, self.ctx.settings.undecided))
                reports = [ReportData("", replace(self.measured_manifest(result, target, compared), kind=""))]
        self.ctx.origin.refuse_changed_files()
        with announcing_stage("drawing"):
            path.parent.mkdir(parents=True, exist_ok=True)
            writer.write_about(reports, path)
        write_unfinished_marker(Path(os.path.abspath(path)), target.call)
        return Page(path, missed)

    def measured_manifest(self, outcome: Outcome, target: Emit, comparison: Comparison) -> Manifest:
        return reproducible_manifest(outcome, target, self.plan, self.cache, self.ctx).with_measures(
            measures=comparison.measures,
            machine=machine_facts(),
            expectations=tuple(expectation(v) for v in comparison.outcomes),
            run={**comparison.run, "steps": [{"name": name, **facts} for name, facts in self.costs.items()]},
        )

    def measure_and_judge_bounds(
        self, outcome: Outcome, target: Emit, folder: Path, forms: list[Form]
    ) -> tuple[Comparison, tuple[BoundVerdict, ...]]:
        """Measures of the artifact, and the verdicts of bounds that were not judged before."""
        if outcome.several:
            return self.verdicts.judge_front((name, program.model) for name, program in outcome.members())
        if outcome.in_place and forms:
            rounds = any(form.rounds for form in forms)
            where = folder / forms[0].folder
            return self.verdicts.judge_model(target, lambda: load_to_judge(where, self.ctx.settings.device), rounds)
        with closing(outcome.members()) as members:
            _, program = next(members)
            return self.verdicts.judge_model(target, lambda: program.model, is_rounded=False)


def reproducible_manifest(outcome: Outcome, target: Emit, plan: Plan, cache: Cache, ctx: Context) -> Manifest:
    """The part of a manifest that is the same whenever the recipe is compiled."""
    recipe = plan.recipe
    return Manifest(
        kind=target.call.word,
        name=plan.pipeline.name,
        effc=version("effc"),
        recipe={
            "name": Path(recipe.source.name).name,
            "text": recipe.source.text,
            "variant": recipe.variant,
            "params": keys.to_jsonable(recipe.params),
            "resolved": resolved_recipe(recipe),
        },
        lock={
            "inputs": inputs(plan, ctx),
            "versions": keys.library_versions(),
            "seed": ctx.seed,
            "threads": ctx.settings.threads,
            "device": ctx.settings.device,
        },
        steps=tuple(step_records(plan, cache, target.source)),
        **edits_and_profiles(outcome, plan, target.source),
    )


def edits_and_profiles(outcome: Outcome, plan: Plan, source: str) -> dict[str, Any]:
    """Edits and widths of a model; of several those of each, with its measures."""
    if outcome.several:
        return {
            "members": tuple(
                {
                    "name": name,
                    "measures": [[metric, *m] for metric, m in outcome.measures[name].items()],
                    "steps": sorted(
                        s.name
                        for s in plan.pipeline.step_and_ancestors(name) or plan.pipeline.step_and_ancestors(source)
                    ),
                    **program_changes(program, plan),
                }
                for name, program in outcome.members()
            )
        }
    assert outcome.program is not None, f"no program: {outcome.kind}"
    return program_changes(outcome.program, plan)


def program_changes(program: Program, plan: Plan) -> dict[str, Any]:
    """Edits of the program, and the widths of its layers before and after them."""
    return {
        "edits": program.edits.to_json(),
        "profile": {
            "before": layer_group_counts(plan.skeleton),
            "after": layer_group_counts_of_packed(
                plan.skeleton, skeleton_of(program), program.edits.swapped, program.edits.layers
            ),
        },
    }


def step_records(plan: Plan, cache: Cache, last_step: str) -> list[Mapping[str, Any]]:
    """Records of every step that led to `last_step`: what it was asked, what it decided and why, what that changed."""
    result: list[Mapping[str, Any]] = []
    for step in plan.pipeline.step_and_ancestors(last_step):
        name = step.name
        body = cache.read_complete_step(plan.key_of(name))
        assert body is not None, f"the result of {name} is not in the cache"
        notes = body["notes"]
        result.append(
            {
                "name": name,
                "word": step.call.word,
                "args": keys.to_jsonable(step.call.args),
                "summary": notes["summary"],
                "changes": notes["changes"],
                "decisions": notes["step"],
                **({"warnings": notes["warnings"]} if notes.get("warnings") else {}),
            }
        )
    return result


def inputs(plan: Plan, ctx: Context) -> dict[str, str]:
    """Identity of the model and of every data set."""
    return {plan.model: plan.identity} | {
        f"data {name}": keys.data_identity(DataRef(name), ctx) for name in sorted(ctx.recipe.data)
    }


def resolved_recipe(recipe: Recipe) -> dict[str, Any]:
    """Models and data with all their arguments, defaults too, and the profiles where there are some."""
    calls = {
        kind: {name: {"word": call.word, "args": keys.to_jsonable(call.args)} for name, call in table.items()}
        for kind, table in (("models", recipe.models), ("data", recipe.data))
    }
    profiles = {name: keys.to_jsonable(facts) for name, facts in recipe.profiles.items()}
    return calls | ({"profiles": profiles} if profiles else {})


def expectation(verdict: BoundVerdict) -> Expectation:
    state = {"ok": "holds", "missed": "fails"}.get(verdict.state, verdict.state)
    line = verdict.bound.span.line if verdict.bound.span else 0
    note = verdict.skipped or verdict.undecided or verdict.uncertainty_reason or verdict.decided_by_text
    return Expectation(bound_text(verdict.bound), verdict.value, verdict.limit, state, line, note)

"""The public door: check, plan, compile, load. Imports torch only where weights or graphs are needed."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from ...dsl.checker.recipe import Bound, Invocation, Pipeline, Recipe
from ...dsl.checker.skeleton import Skeleton
from ...dsl.syntax.diagnostics import EXITS, Diagnostic, Fault, Reject, sorted_distinct_diagnostics
from ...dsl.syntax.nearest import nearest_name_help
from ...dsl.syntax.overlap import hides_checker_error, is_at_or_around
from ...dsl.syntax.parse import parse, read_source, unknown_edition
from ...dsl.syntax.source import Source
from ..analysis.discovery.structure import cached_skeleton, refuse_weights_unlike_skeleton, shipped_skeleton
from ..core.cache import default_cache_folder
from ..core.device import refuse_unusable_device, set_torch_threads_and_fill_settings
from ..core.error_location import diagnostics_located_at
from ..core.events import Warned, announcing_stage
from ..core.options import apply_option_rules, boolean_rule, invalid_option, optional_rule, text_list_option
from ..core.options import path_rule as path_option
from ..core.run_state import RunState
from ..core.settings import Settings
from ..core.warned import model_remark
from ..models.checkpoints.origin import Origin
from ..plugin.context import Context
from ..plugin.input_files import missing_file_warnings
from ..plugin.registry import Registry
from ..transforms.editing.rehearsed import load_or_discover_skeleton
from .data_faults import unreadable_data_diagnostics
from .models import resolve_recipe_model
from .session_options import Options, session_options, with_current_names, with_device_of_map

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ...dsl.checker.check import Checked
    from ...dsl.checker.overrides import Overrides
    from ..analysis.planning.lock import Fact
    from ..analysis.planning.plan import Plan
    from ..artifacts.load import LoadOptions
    from .bisect import BisectResult
    from .pipeline import Result

nothing_to_emit = Fault("nothing-to-emit", "A recipe was compiled whose pipelines emit no artifact.", exit="usage")
no_such_pipeline = Fault("no-such-pipeline", "`--pipeline` names a pipeline that the recipe has not.", exit="usage")
unseen_model = Fault(
    "unseen-model",
    "What a model is made of is not known yet.\n\n"
    "Selectors and amounts are compared with the model's structure, which effc finds once for every config: in "
    "`effc plan`, `effc compile` and `effc check --resolve`, which import torch and may fetch the model's files.",
    severity="note",
)


@dataclass
class Session:
    """One recipe file and what the command line said: shared by check, plan, compile and test."""

    path: Path
    settings: Settings
    set: Mapping[str, Any] | Sequence[str] = ()  # {name: value}, or "name=value" texts
    params: Path | None = None  # --params file.json
    registry: Registry = field(default_factory=Registry)
    origins: dict[str, Origin] = field(default_factory=dict)
    run: RunState = field(default_factory=RunState)
    pipelines: tuple[str, ...] = ()  # the others are left out; none: all of them
    rows: dict[tuple[str, str], dict[str, "Tensor"]] = field(default_factory=dict)  # of data, by variant and pipeline
    texts: Mapping[Path, str] = field(default_factory=dict)  # of files that an editor has open, by resolved path

    def check(self, *, resolve: bool = False) -> "Checked":
        """Check the recipe for everything that can be known without weights.

        `resolve` makes skeletons that are not known yet, and reads data files, which imports torch.
        """
        from ...dsl.checker.check import Checked, check_recipe_file
        from .tuning.open_steps import open_step_faults

        parsed = parse(self._read_open_or_stored_text(self.path))
        if foreign := [d for d in parsed.diagnostics if d.fault is unknown_edition]:
            return Checked((), tuple(foreign))  # what the rest means is not known here
        faults: list[Diagnostic] = []

        def structure(call: Invocation) -> Skeleton | None:
            try:
                known = self.skeleton(call) if resolve else self.stored_skeleton(call)
            except Reject as rejection:  # one fault among those of the recipe
                faults.extend(rejection.diagnostics)
                return None
            if known is None:
                faults.append(
                    unseen_model(
                        "this model was not looked at yet, so selectors and amounts are not compared with it",
                        call.span,
                        help="`effc plan` looks at it and finds what is wrong; so does `effc check --resolve`",
                    )
                )
            return known

        checked = check_recipe_file(
            parsed.file,
            self.registry.vocabulary,
            overrides=self.read_param_overrides(),
            read_module=self.read_library_module,
            find_skeleton=structure,
            has_syntax_errors=any(d.severity == "error" for d in parsed.diagnostics),
        )
        for recipe in checked.recipes:
            absent = missing_file_warnings(recipe, self.registry.vocabulary, self.path.parent)
            faults += [d for d in absent if not any(is_at_or_around(other, d) for other in faults)]
            faults += open_step_faults(self, recipe)
        known = [
            d for d in checked.diagnostics if not any(hides_checker_error(other, d) for other in parsed.diagnostics)
        ]
        ordered = sorted_distinct_diagnostics((*parsed.diagnostics, *known, *faults))
        broken = any(d.severity == "error" for d in ordered)
        if resolve and not broken and (data_diagnostics := unreadable_data_diagnostics(self, checked.recipes)):
            ordered, broken = sorted_distinct_diagnostics((*ordered, *data_diagnostics)), True
        return Checked(() if broken else checked.recipes, ordered, checked.unresolved)

    def _read_open_or_stored_text(self, path: str | Path) -> Source:
        """A file's text: as the editor has it, else as the disk does."""
        open_ = self.texts.get(Path(path).resolve()) if self.texts else None
        return read_source(path) if open_ is None else Source(str(path), open_)

    def read_param_overrides(self) -> "Overrides":
        """Values of params from a file, the environment and --set, the later ones stronger."""
        from ...dsl.checker.overrides import read_overrides

        texts = self.set.items() if isinstance(self.set, Mapping) else ()
        sets = [f"{name}={text}" for name, text in texts] or list(self.set)
        return read_overrides(sets, _read_params_file(self.params) if self.params else None, os.environ)

    def recipes(self, *, resolve: bool = False) -> tuple[Recipe, ...]:
        """The checked variants; raises Reject with all faults."""
        return self.recipes_and_warnings(resolve=resolve)[0]

    def recipes_and_warnings(self, *, resolve: bool = False) -> tuple[tuple[Recipe, ...], tuple[Diagnostic, ...]]:
        """The checked variants, and what the checker warns of; raises Reject with all faults."""
        checked = self.check(resolve=resolve)
        if any(d.severity == "error" for d in checked.diagnostics):
            raise Reject(*checked.diagnostics)
        recipes = self._with_named_pipelines(checked.recipes) if self.pipelines else checked.recipes
        return recipes, tuple(d for d in checked.diagnostics if d.severity == "warning")

    def _with_named_pipelines(self, recipes: tuple[Recipe, ...]) -> tuple[Recipe, ...]:
        """Recipes with the named pipelines alone. Raises Reject (no-such-pipeline)."""
        known = [name for recipe in recipes for name in recipe.pipelines]
        unknown = [
            no_such_pipeline(
                f"{self.path} has no pipeline `{name}`", help=nearest_name_help(name, known, "its pipelines are")
            )
            for name in self.pipelines
            if name not in known
        ]
        if unknown:
            raise Reject(*unknown)
        return tuple(
            replace(recipe, pipelines={n: p for n, p in recipe.pipelines.items() if n in self.pipelines})
            for recipe in recipes
        )

    def context(self, recipe: Recipe, pipeline: Pipeline) -> Context:
        model_origin = self.resolve_model_origin(recipe.models[pipeline.model])
        work = self.settings.cache_dir / "work"
        rows = self.rows.setdefault((recipe.variant, pipeline.name), {})
        return Context(self.settings, recipe, self.path.parent, self.registry, model_origin, work, self.run, rows)

    def resolve_model_origin(self, call: Invocation) -> Origin:
        """The resolved source of a model; each is resolved once."""
        key = skeleton_cache_key(call)
        if key not in self.origins:
            ctx = Context.without_recipe(self.settings, self.path.parent, self.registry)
            with diagnostics_located_at(call.span):
                resolved = resolve_recipe_model(call, ctx.relative_to(call))
            self.origins[key] = resolved.with_span_and_load_device(call.span, self.settings.device)
        return self.origins[key]

    def stored_skeleton(self, call: Invocation) -> Skeleton | None:
        """The skeleton of a model if it is shipped or was made before; needs no torch and no network."""
        offline_session = replace(self, settings=replace(self.settings, offline=True))
        try:
            origin = offline_session.resolve_model_origin(call)
        except Reject as rejection:
            if all(d.exit == EXITS["network"] for d in rejection.diagnostics):
                return None
            raise
        return shipped_skeleton(origin) or cached_skeleton(origin, self.settings)

    def skeleton(self, call: Invocation) -> Skeleton:
        return load_or_discover_skeleton(self.resolve_model_origin(call), self.settings)

    def read_library_module(self, name: str) -> Source | None:
        """A module that a recipe uses: `std.name` of the shipped library, `edge.name` of a package, else a path."""
        from ..plugin.recipe_library import MODULES, library_files
        from ..plugin.recipe_packages import read_package_module

        if name.startswith(f"{MODULES}."):
            recipe = library_files().get(name)
            return self._read_open_or_stored_text(recipe.path) if recipe else None
        if "/" not in name and (packed := read_package_module(name, self.path.parent, self.settings.cache_dir)):
            return packed
        return self._read_module_file(name) if os.path.isfile(name) else None

    def _read_module_file(self, name: str) -> Source:
        """A module by its path. Of a file outside the recipe's folder that is no text, nothing is said but that."""
        if Path(name).resolve().is_relative_to(self.path.parent.resolve()):
            return self._read_open_or_stored_text(name)
        try:
            return replace(self._read_open_or_stored_text(name), foreign=True)
        except Reject:
            return Source(name, "", foreign=True)


def skeleton_cache_key(call: Invocation) -> str:
    """Key of a model in a session."""
    return repr((call.word, sorted(call.args.items()), call.folder))


def _read_params_file(path: Path) -> Source:
    """The text of a params file; whatever is wrong with it is a mistake of the command line."""
    from ...dsl.checker.overrides import invalid_override

    if not os.path.isfile(path):
        raise invalid_override(
            f"there is no params file `{path}`", help='it holds one JSON object: {"keep": "80%"}'
        ).rejection()
    try:
        return read_source(path)
    except Reject as rejection:
        raise Reject(*(replace(d, fault=invalid_override) for d in rejection.diagnostics)) from rejection


def check(path: str | Path, **options: Unpack[Options]) -> "Checked":
    """All mistakes of a recipe file that can be known without weights."""
    return open_session(path, **options).check()


def plan(path: str | Path, *, pipelines: Sequence[str] | None = None, **options: Unpack[Options]) -> "list[Plan]":
    """Plan of a recipe file, per variant and pipeline, or of the named pipelines alone; reads no weights."""
    session = _with_pipelines(open_session(path, **options), pipelines)
    plans = plan_all_pipelines(session)
    from .judging.planned_sizes import refuse_unreachable_bounds

    refuse_unreachable_bounds(session, plans)
    return plans


def compile(
    path: str | Path,
    out: str | Path = "out",
    *,
    force: bool = False,
    pipelines: Sequence[str] | None = None,
    **options: Unpack[Options],
) -> "list[Result]":
    """Compile a recipe file, or the named pipelines of it, into artifacts below `out`.

    Raises Reject for whatever the user can mend. A missed `expect` does not raise: see `Result.missed`.
    """
    values = apply_option_rules({"out": out, "force": force}, {"out": path_option, "force": boolean_rule})
    return build(_with_pipelines(open_session(path, **options), pipelines), values["out"], force=values["force"])


def _with_pipelines(session: Session, pipeline_names: Sequence[str] | None) -> Session:
    names = apply_option_rules({"pipelines": pipeline_names}, {"pipelines": optional_rule(text_list_option)})[
        "pipelines"
    ]
    return replace(session, pipelines=tuple(names or ()))


def load(path: str | Path, **options: "Unpack[LoadOptions]") -> "PreTrainedModel":
    """A compiled model: of the target `hf`, one of transformers that generates, trains and saves; else by an engine."""
    from ..artifacts.load import load

    return load(path, **with_device_of_map(with_current_names(options)))


def open_session(path: str | Path, **options: Unpack[Options]) -> Session:
    """One recipe file with what is said of it. Raises Reject (bad-option) for values that mean nothing."""
    if callable(getattr(path, "state_dict", None)):
        raise invalid_option(
            "`path` is a model, where a recipe's is needed", help="`effc.optimize` takes models"
        ).rejection()
    file = apply_option_rules({"path": path}, {"path": path_option})["path"]
    return Session(file, *session_options(with_current_names(options)))


def plan_all_pipelines(session: Session) -> "list[Plan]":
    session.recipes()
    from ..analysis.planning import lock
    from ..analysis.planning.plan import plan_pipeline

    (recipes, warnings), result = session.recipes_and_warnings(resolve=True), []
    if session.settings.locked:
        session.settings = lock.with_locked_threads(session.path, session.settings)
    refuse_unusable_device(session.settings.device)
    session.settings = set_torch_threads_and_fill_settings(session.settings)
    for recipe in recipes:
        for pipeline in recipe.pipelines.values():
            ctx = session.context(recipe, pipeline)
            with announcing_stage("finding the model's structure"):
                skeleton = load_or_discover_skeleton(ctx.origin, session.settings)
            with diagnostics_located_at(recipe.models[pipeline.model].span):
                refuse_weights_unlike_skeleton(ctx.origin, skeleton)
            with announcing_stage("estimating time and memory"):
                result.append(plan_pipeline(recipe, pipeline, ctx, skeleton))
    if session.settings.locked:
        lock.refuse_lock_drift(session.path, _lock_facts(session, result), session.settings, bool(session.pipelines))
    for origin in session.origins.values():
        for note in origin.notes:
            session.settings.on_event(Warned(model_remark(f"{origin.label}: {note}")))
    for warning in warnings:
        session.settings.on_event(Warned(warning))
    return result


def lock(session: Session) -> tuple[Path, dict[str, str]]:
    """Write the lock of a recipe; its path and what it says."""
    from ..analysis.planning import lock

    known = _lock_facts(session, plan_all_pipelines(session))
    return lock.write_lock(session.path, known), {name: fact.text for name, fact in known.items()}


def _lock_facts(session: Session, plans: "Sequence[Plan]") -> "dict[str, Fact]":
    from ..analysis.planning.lock import lock_facts

    return lock_facts(plans, [session.context(p.recipe, p.pipeline) for p in plans])


def bisect_bound(session: Session, plan: "Plan", bound: Bound) -> "BisectResult":
    """Find the step of a plan, or its cut, that broke a bound; steps that the cache lacks are run."""
    from ..core.cache import Cache
    from .bisect import Bisection

    ctx = session.context(plan.recipe, plan.pipeline)
    return Bisection(plan, ctx, Cache(session.settings.cache_dir), bound).run()


def build(
    session: Session,
    out: Path,
    *,
    force: bool = False,
    saved_plans: Any = None,
    dump_ir: str = "",
    on_plan: "Callable[[Plan], None]" = lambda plan: None,
) -> "list[Result]":
    """Compile every pipeline that emits something; `saved_plans` is a plan of `plan -o`, whose drift is refused."""
    from ..artifacts.output_lock import check_outputs, output_paths, outputs_locked_until_finished
    from .worker_pool import make_transport, parse_workers_option, worker_team

    if session.settings.workers:
        parse_workers_option(session.settings.workers)
    outputs = output_paths(session.recipes(), out, session.registry.describes_artifacts)
    check_outputs(outputs, force)  # all of it before torch is imported, which takes seconds
    from ..analysis.planning.free_space import refuse_insufficient_space_or_memory
    from ..analysis.planning.plan import refuse_plan_drift
    from ..core.cache import Cache
    from ..core.deadline import Deadline
    from .pipeline import Build

    transport = make_transport(session.settings) if session.settings.workers else None
    if session.settings.max_time is not None:
        session.run.deadline = Deadline(session.settings.max_time)
    compiled = [p for p in plan_all_pipelines(session) if p.pipeline.emits]
    if not compiled:
        raise nothing_to_emit(f"{session.path} emits no artifact", help='add `emit NAME { hf("folder") }`').rejection()
    if saved_plans is not None:
        refuse_plan_drift(saved_plans, compiled)
    results: list[Result] = []
    with outputs_locked_until_finished(outputs, force):
        refuse_insufficient_space_or_memory(compiled, out, session.settings.cache_dir)
        cache = Cache(session.settings.cache_dir)
        cache.delete_stale_drafts_and_count_bytes()
        with worker_team(session, transport) as team:
            for plan in compiled:
                on_plan(plan)
                ctx = session.context(plan.recipe, plan.pipeline)
                results.append(Build(plan, ctx, cache, dump=dump_ir, team=team).run(plan.folder(out), force))
    return results


__all__ = [
    "Options",
    "Session",
    "build",
    "check",
    "compile",
    "default_cache_folder",
    "load",
    "open_session",
    "plan",
    "plan_all_pipelines",
]

"""From a syntax tree to checked recipes: all that can be known without weights, all faults at once."""

from collections.abc import Callable
from dataclasses import dataclass, field

from ..syntax import ast
from ..syntax.diagnostics import Diagnostic, Fault, sorted_distinct_diagnostics
from ..syntax.source import Source, Span
from .contradictions import report_bounds_on_worse_side, report_contradicting_bounds
from .declare import declare_names_in_order, declared_name
from .demands import report_conflicting_arguments_and_missing_steps
from .expectations import (
    check_emit_calls,
    nothing_emitted,
    read_bound,
    report_invalid_artifact_paths,
    report_unmeasured_effects,
)
from .judged_rows import report_judged_rows
from .overrides import Overrides
from .params import Argument, param_arguments_of_variants, variant_name
from .pipelines import PipelineBuild, read_pipeline, report_unused_steps
from .recipe import Bound, Emit, Invocation, Pipeline, Recipe, Step
from .result_kinds import report_unaccepted_results, report_unknown_bound_parts
from .scope import LABELS, CheckState, Scope, Variant
from .skeleton import Skeleton
from .typed import kind_mismatch_diagnostic
from .values import DataRef, MetricRef, references_in
from .vocabulary import Vocabulary

empty_recipe = Fault("empty-recipe", "A recipe has no pipeline, so there is nothing to compile.")
unused_name = Fault("unused-name", "A declaration is never used.", severity="warning")


@dataclass(frozen=True)
class Checked:
    """Recipes, one per variant and none where there is an error; `unresolved` models have no skeleton yet."""

    recipes: tuple[Recipe, ...]
    diagnostics: tuple[Diagnostic, ...]
    unresolved: tuple[str, ...] = ()

    @property
    def errors(self) -> tuple[Diagnostic, ...]:
        return tuple(d for d in self.diagnostics if d.severity == "error")


def check_recipe_file(
    file: ast.File,
    vocabulary: Vocabulary,
    *,
    find_skeleton: Callable[[Invocation], Skeleton | None] = lambda _: None,
    overrides: Overrides | None = None,
    read_module: Callable[[str], Source | None] = lambda _: None,
    has_syntax_errors: bool = False,
) -> Checked:
    """Check a recipe.

    skeleton    the skeleton of a model, or None where it isn't known yet: checks against it are then left out
    overrides   values of params from the command line, the environment or a file
    library     the source of a module: "std.text", or a path relative to the working folder
    broken      whether the parser reported errors: what it could not read may declare and use anything, so names
                that are missing there stay silent, and so does what nothing seems to use
    """
    overrides = overrides or Overrides()
    session = CheckState(
        vocabulary,
        read_module,
        find_skeleton,
        list(overrides.diagnostics),
        overrides=overrides,
        open=[file.source.name],
        unparsed=_names_missing_from_syntax_tree(file) if has_syntax_errors else frozenset(),
        broken=has_syntax_errors,
    )
    checked = [
        _check_matrix_variant(file, arguments, session) for arguments in param_arguments_of_variants(file, session)
    ]
    unresolved = sorted({name for _, names in checked for name in names})
    faults = sorted_distinct_diagnostics(_deduplicated(session.faults))
    sound = not any(d.severity == "error" for d in faults)
    return Checked(tuple(r for r, _ in checked) if sound else (), faults, tuple(unresolved))


def _names_missing_from_syntax_tree(file: ast.File) -> frozenset[str]:
    """Names that the text declares and the tree doesn't have: their mistake was reported by the parser."""
    import re

    text = file.source.text
    for comment in file.comments:
        text = text[: comment.span.start] + " " * len(comment.text) + text[comment.span.start + len(comment.text) :]
    matches = re.findall(r"\b(?:param|model|data|profile|pipeline|as)\s+(\w+)|\b(\w+)\s*[=:]", text)
    read = {name.path for s in file.statements if (name := declared_name(s))}
    read |= {step.name.path for s in file.statements if isinstance(s, ast.Pipeline) for step in s.steps}
    return frozenset(name for pair in matches for name in pair if name) - read


def _deduplicated(faults: list[Diagnostic]) -> list[Diagnostic]:
    """Variants find the same faults again; one place has one fault of a kind."""
    by_site: dict = {}
    for fault in faults:
        by_site.setdefault((fault.slug, fault.span or fault.message), fault)
    return list(by_site.values())


def _check_matrix_variant(
    file: ast.File, arguments: dict[str, Argument], session: CheckState
) -> tuple[Recipe, list[str]]:
    """Check one variant of a recipe; the recipe, and the models without a skeleton. Faults go to the session."""
    scope = Scope(session, Variant(), arguments=arguments)
    results: dict[str, _Result] = {}
    declare_names_in_order(file, scope, lambda statement: _read_pipeline_expect_or_emit(statement, scope, results))
    unnamed_emit = any(isinstance(s, ast.Emit) and s.pipeline.path not in scope.names for s in file.statements)
    report_invalid_artifact_paths([e for r in results.values() for e in r.emits], scope)
    if not session.broken:
        _report_unused_results_and_names(file, scope, results, unnamed_emit)
    for result in results.values():
        if result.line:
            report_conflicting_arguments_and_missing_steps(result.line, result.emits)
            report_judged_rows(result.line, result.bounds, result.emits)
            report_contradicting_bounds(result.bounds, scope)
            report_bounds_on_worse_side(result.bounds, scope)
    unresolved = _check_steps_by_skeletons([r.line for r in results.values() if r.line], scope)
    params = {
        n: e.value for n, e in scope.names.items() if e.kind == "param" and not isinstance(e.value, DataRef | MetricRef)
    }
    variant, doc = scope.variant, file.doc.value if file.doc else ""
    pipelines = {name: r.pipeline() for name, r in results.items() if r.line}
    data = {n: call for n, call in variant.data.items() if "." not in n or n in _data_references(pipelines)}
    return Recipe(
        file.source,
        doc,
        params,
        variant.models,
        data,
        variant.profiles,
        pipelines,
        variant_name(arguments),
        scope.origins,
    ), unresolved


def _data_references(pipelines: dict[str, Pipeline]) -> set[str]:
    """Names of the data that steps, targets and bounds read: what a module only offers is no part of the recipe."""
    calls = [step.call.args for p in pipelines.values() for step in p.steps]
    calls += [emit.call.args for p in pipelines.values() for emit in p.emits]
    return {
        ref.name
        for value in (*calls, *(b.metric for p in pipelines.values() for b in p.expects))
        for ref in references_in(value, DataRef)
    }


@dataclass
class _Result:
    """A pipeline with what is demanded and written of it; `line` is None where its model is unknown."""

    node: ast.Pipeline
    line: PipelineBuild | None
    bounds: list[Bound] = field(default_factory=list)
    emits: list[Emit] = field(default_factory=list)
    emitted: set[str] = field(default_factory=set)  # names of its targets, of those with faults too

    def report_unused_results(self, has_misnamed_emit: bool) -> None:
        """Report what nothing uses; `has_misnamed_emit` where an emit names no pipeline, and may have meant this
        one."""
        if self.line is None:
            return
        if not self.emitted and not has_misnamed_emit:
            name = self.node.name
            self.line.scope.report(
                nothing_emitted(
                    f"nothing of `{name.path}` is emitted", name.span, help=f'add `emit {name.path} {{ hf("hf") }}`'
                )
            )
        report_unaccepted_results(self.line)
        report_unknown_bound_parts(self.bounds, self.emitted, self.line)
        report_unmeasured_effects(self.bounds, self.line)
        report_unused_steps(self.line, {e.source for e in self.emits})

    def pipeline(self) -> Pipeline:
        steps = tuple(Step(s.name, s.call, s.source) for s in self.line.stages if s.sound and s.call)
        return Pipeline(
            self.node.name.path, self.line.input, steps, tuple(self.bounds), tuple(self.emits), self.node.span
        )


def _read_pipeline_expect_or_emit(statement: ast.Statement, scope: Scope, results: dict[str, "_Result"]) -> None:
    """Read a pipeline, or what an `expect` or `emit` says of one, with the names that are known by then."""
    if isinstance(statement, ast.Pipeline):
        results.setdefault(statement.name.path, _Result(statement, read_pipeline(statement, scope)))
    if not isinstance(statement, (ast.Expect, ast.Emit)):
        return
    name = statement.pipeline
    entry = scope.names.get(name.path)
    if entry is None:
        scope.report_unknown_name(name, ("pipeline",), noun="pipeline")
    elif entry.kind != "pipeline":
        scope.report(kind_mismatch_diagnostic(name, entry, ", a pipeline is needed"))
    result = results.get(name.path)
    line = result.line if result else None
    inner = line.scope if line else scope
    if isinstance(statement, ast.Expect):
        bounds = [b for bound in statement.bounds if (b := read_bound(bound, inner))]
        if result:
            result.bounds += bounds
    elif result:
        result.emitted |= {call.name.path for call in statement.targets}
        result.emits += check_emit_calls(result.node, statement.targets, line) if line else []


def _report_unused_results_and_names(
    file: ast.File, scope: Scope, results: dict[str, "_Result"], has_misnamed_emit: bool
) -> None:
    """Report what comes to nothing: results, names, the whole recipe."""
    for result in results.values():
        result.report_unused_results(has_misnamed_emit)
    if not any(isinstance(s, ast.Pipeline) for s in file.statements):
        _report_recipe_without_pipeline(file, scope)
    _report_unused_names(scope)


def _report_recipe_without_pipeline(file: ast.File, scope: Scope) -> None:
    text = file.source.text
    span = file.statements[-1].span if file.statements else Span(file.source, 0, len(text.split("\n", 1)[0]))
    scope.report(
        empty_recipe(
            "the recipe has no pipeline",
            span,
            help="add `pipeline lean(base) { ... }`; a file of names for `use` is checked with the recipe that uses it",
        )
    )


def _report_unused_names(scope: Scope) -> None:
    for name, entry in scope.names.items():
        unread_module = entry.kind == "module" and entry.scope is None  # what is wrong with it is said already
        if not entry.used and entry.kind != "pipeline" and name not in scope.early and not unread_module:
            scope.report(
                unused_name(
                    f"{LABELS[entry.kind].split()[-1]} `{name}` is never used",
                    entry.span,
                    help="drop the line, or use the name",
                )
            )


def _check_steps_by_skeletons(builds: list[PipelineBuild], scope: Scope) -> list[str]:
    """Compare steps with the structure of their models; the names of models that have no skeleton yet."""
    from .structure import report_steps_incompatible_with_skeleton

    unresolved = []
    for line in builds:
        model = scope.variant.models.get(line.input)
        if model is None:
            continue
        if (skeleton := scope.session.skeleton(model)) is None:
            unresolved.append(line.input)
        else:
            report_steps_incompatible_with_skeleton(line, skeleton)
    return unresolved

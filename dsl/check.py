"""From a syntax tree to checked recipes: all that can be known without weights, all faults at once."""

from collections.abc import Callable
from dataclasses import dataclass

from . import ast
from .declare import declare_all
from .diagnostics import Diagnostic, Fault, in_order
from .outcomes import nothing_emitted, read_bound, read_emits, report_paths
from .overrides import Overrides
from .params import Given, variant_name, variants
from .pipelines import Line, read_steps, report_unused
from .recipe import Emit, Invocation, Pipeline, Recipe, Step
from .scope import LABELS, Scope, Session, Variant
from .skeleton import Skeleton
from .source import Source, Span
from .typed import wrong_type
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


def check(file: ast.File, vocabulary: Vocabulary, *, skeleton: Callable[[Invocation], Skeleton | None] = lambda _: None,
          overrides: Overrides | None = None, library: Callable[[str], Source | None] = lambda _: None) -> Checked:
    """Check a recipe.

    skeleton    the skeleton of a model, or None where it isn't known yet: checks against it are then left out
    overrides   values of params from the command line, the environment or a file
    library     the source of a module: "std.text", or a path that has been made relative to the working folder
    """
    overrides = overrides or Overrides()
    session = Session(vocabulary, library, skeleton, list(overrides.diagnostics), overrides=overrides,
                      open=[file.source.name])
    made = [_variant(file, given, session) for given in variants(file, session)]
    unresolved = sorted({name for _, names in made for name in names})
    faults = in_order(_one_per_place(session.faults))
    sound = not any(d.severity == "error" for d in faults)
    return Checked(tuple(r for r, _ in made) if sound else (), faults, tuple(unresolved))


def _one_per_place(faults: list[Diagnostic]) -> list[Diagnostic]:
    """Variants find the same faults again; one place has one fault of a kind."""
    seen: dict = {}
    for fault in faults:
        place = (fault.span.source.name, fault.span.start, fault.span.end) if fault.span else fault.message
        seen.setdefault((fault.slug, place), fault)
    return list(seen.values())


def _variant(file: ast.File, given: dict[str, Given], session: Session) -> tuple[Recipe, list[str]]:
    """One recipe, and the models without a skeleton. Faults go to the session."""
    scope = Scope(session, Variant(), given=given)
    declare_all(file, scope)
    pipelines = {}
    lines: dict[str, Line] = {}
    for statement in file.statements:
        if isinstance(statement, ast.Pipeline):
            line = read_steps(statement, scope)
            if line:
                lines[statement.name.path] = line
    outcomes = _outcomes(file, scope)
    emits: list[Emit] = []
    for statement in file.statements:
        if isinstance(statement, ast.Pipeline) and (line := lines.get(statement.name.path)):
            pipeline = _pipeline(statement, line, outcomes, scope)
            emits += pipeline.emits
            pipelines[pipeline.name] = pipeline
    report_paths(emits, scope)
    if not any(isinstance(s, ast.Pipeline) for s in file.statements):
        _report_empty(file, scope)
    _report_unused_names(scope)
    unresolved = _structure(lines, scope)
    params = {n: e.value for n, e in scope.names.items() if e.kind == "param"}
    variant = scope.variant
    doc = file.doc.value if file.doc else ""
    return Recipe(file.source, doc, params, variant.models, variant.data, variant.profiles, pipelines,
                  variant_name(given), scope.origins), unresolved


def _outcomes(file: ast.File, scope: Scope) -> dict[str, tuple[list[ast.Bound], list[ast.Call]]]:
    """Bounds and targets by pipeline; reports those of pipelines that don't exist or stand further down."""
    out: dict[str, tuple[list[ast.Bound], list[ast.Call]]] = {}
    for statement in file.statements:
        if not isinstance(statement, (ast.Expect, ast.Emit)):
            continue
        name = statement.pipeline
        entry = scope.names.get(name.path)
        if entry is None:
            scope.unknown(name, ("pipeline",), what="pipeline")
        elif entry.kind != "pipeline":
            scope.report(wrong_type(f"`{name.path}` is {LABELS[entry.kind]}, a pipeline is needed", name.span,
                                    related=((entry.span, "declared here"),)))
        else:
            entry.used = True
            bounds, calls = out.setdefault(name.path, ([], []))
            if isinstance(statement, ast.Expect):
                bounds += statement.bounds
            else:
                calls += statement.targets
    return out


def _pipeline(node: ast.Pipeline, line: Line, outcomes, scope: Scope) -> Pipeline:
    bounds, calls = outcomes.get(node.name.path, ([], []))
    checked = [b for bound in bounds if (b := read_bound(bound, line.scope))]
    emits = [emit for emit, _ in read_emits(node, tuple(calls), line)]
    if not calls:
        scope.report(nothing_emitted(f"nothing of `{node.name.path}` is emitted", node.name.span,
                                     help=f'add `emit {node.name.path} {{ hf("hf") }}`'))
    if line.stages:
        report_unused(line, {e.source for e in emits})
    steps = tuple(Step(s.name, s.call, s.source) for s in line.stages if s.call)
    return Pipeline(node.name.path, line.input, steps, tuple(checked), tuple(emits), node.span)


def _report_empty(file: ast.File, scope: Scope) -> None:
    text = file.source.text
    place = file.statements[-1].span if file.statements else Span(file.source, 0, len(text.split("\n", 1)[0]))
    scope.report(empty_recipe("the recipe has no pipeline", place,
                              help="add `pipeline lean(base) { ... }`; a file of names for `use` is checked "
                                   "with the recipe that uses it"))


def _report_unused_names(scope: Scope) -> None:
    for name, entry in scope.names.items():
        if not entry.used and entry.kind != "pipeline":
            scope.report(unused_name(f"{LABELS[entry.kind].split()[-1]} `{name}` is never used", entry.span,
                                     help="drop the line, or use the name"))


def _structure(lines: dict[str, Line], scope: Scope) -> list[str]:
    """Compare steps with the structure of their models; the names of models that have no skeleton yet."""
    from .structure import check_line

    unresolved = []
    for line in lines.values():
        model = scope.variant.models.get(line.input)
        if model is None:
            continue
        if (skeleton := scope.session.skeleton(model)) is None:
            unresolved.append(line.input)
        else:
            check_line(line, skeleton)
    return unresolved

"""A recipe whose steps are open, and the recipes that close it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ....dsl.checker.check import check_recipe_file
from ....dsl.checker.recipe import Bound, Emit, Invocation, Pipeline, Recipe, Step
from ....dsl.checker.value_text import quoted, value_text
from ....dsl.checker.values import DataRef, MetricRef, references_in
from ....dsl.syntax import ast
from ....dsl.syntax.diagnostics import Diagnostic, Fault
from ....dsl.syntax.format import format_source
from ....dsl.syntax.parse import parse
from ....dsl.syntax.source import Source, Span
from ...core.events import Warned
from ...plugin.context import Context

if TYPE_CHECKING:
    from ..api import Session

OPEN_STEPS = "search.steps"
not_open = Fault(
    "not-open",
    "`effc tune` was asked of a recipe whose steps are not open, or are open in several places.\n\n"
    "It searches the steps of one pipeline, where `search.steps` stands, for one target.",
)


@dataclass(frozen=True)
class Wish:
    """One pipeline with open steps.

    step       the open one
    emit       the target whose arguments are open as far as they are not written
    warnings   those of the checker, which were emitted
    """

    session: "Session"
    recipe: Recipe
    pipeline: Pipeline
    step: Step
    emit: Emit
    warnings: tuple[Diagnostic, ...] = ()

    @property
    def objectives(self) -> tuple[MetricRef, ...]:
        """Metric to be best at, or the two of a front."""
        args = self.step.call.args
        return tuple(ref for ref in (args["optimize"], args["against"]) if ref is not None)

    @property
    def seconds(self) -> float:
        """Time for the search."""
        return self.step.call.args["within"].seconds

    @property
    def data(self) -> DataRef:
        """Rows that passes read."""
        return self.step.call.args["data"]

    @property
    def choose(self) -> DataRef:
        """Rows that candidates are measured on."""
        return self.step.call.args["choose"]

    @property
    def train(self) -> DataRef | None:
        """Rows that pruned candidates are healed on."""
        return self.step.call.args["train"]

    @property
    def data_names(self) -> set[str]:
        """Names of the data sets that the pipeline's steps, the open one among them, and its target read."""
        calls = [self.emit.call, *(step.call for step in self.pipeline.steps)]
        return {ref.name for call in calls for ref in references_in(call.args, DataRef)}

    @property
    def is_native(self) -> bool:
        return self.emit.call.word == "native"

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """Bounds that a search can judge of the artifact: on this machine, against the model itself."""
        word = self.emit.call.word
        here = (b for b in self.pipeline.expects if b.part in ("", word) and b.profile is None)
        return tuple(b for b in here if b.baseline in (None, self.pipeline.model))

    def metric_text_on_choose_rows(self, metric: MetricRef) -> str:
        """Text of a metric on the rows that candidates are measured on."""
        return _metric_text_on_data(metric, self.choose)

    @cached_property
    def context(self) -> Context:
        return self.session.context(self.recipe, self.pipeline)

    def allows_all(self, plugin_names: Sequence[str]) -> bool:
        """Whether `among` names all passes and formats of an alternative."""
        patterns = self.step.call.args["among"]
        return not patterns or all(any(fnmatch(word, p) for p in patterns) for word in plugin_names)

    def text_with_step_replaced(self, steps: Sequence[str], target_arguments: str, path_suffix: str = "") -> str:
        """Text of the recipe with steps in place of the open one, more arguments of the target, and a suffix of the
        path that it writes to. Other pipelines whose steps are open are left out: they would not compile."""
        source = self.recipe.source
        step, target = _spans_of_open_step_and_target(source, self.pipeline.name, self.step.name, self.emit.call)
        edits = [(step, "\n  ".join(steps))]
        if target_arguments:
            last = max(
                (span.end for span in self.emit.call.spans.values()),
                default=target.start + len(self.emit.call.word) + 1,
            )
            edits.append((Span(source, last, last), f", {target_arguments}"))
        if path_suffix:
            path = self.emit.call.argument_or_call_span("path")
            assert path is not None, "a target of a recipe has a written path"
            edits.append((path, quoted(f"{self.emit.call.args['path']}{path_suffix}")))
        edits += [(span, "") for span in self._spans_of_other_open_pipelines()]
        text = source.text
        for span, new in sorted(edits, key=lambda edit: -edit[0].start):
            text = text[: span.start] + new + text[span.end :]
        return format_source(self._without_unused_declarations(Source(source.name, text)))

    def _spans_of_other_open_pipelines(self) -> list[Span]:
        statements = parse(self.recipe.source).file.statements
        pipelines = [s for s in statements if isinstance(s, ast.Pipeline) and s.name.path != self.pipeline.name]
        open_pipelines = {p.name.path for p in pipelines if any(s.call.name.path == OPEN_STEPS for s in p.steps)}
        return [
            s.span
            for s in statements
            if (isinstance(s, ast.Pipeline) and s.name.path in open_pipelines)
            or (isinstance(s, (ast.Expect, ast.Emit)) and s.pipeline.path in open_pipelines)
        ]

    def _without_unused_declarations(self, source: Source) -> Source:
        """The text without declarations that only the open step used."""
        vocabulary, library = self.session.registry.vocabulary, self.session.read_library_module
        while True:
            parsed = parse(source)
            faults = check_recipe_file(
                parsed.file, vocabulary, read_module=library, find_skeleton=lambda call: None
            ).diagnostics
            spans = [d.span for d in faults if d.slug == "unused-name" and d.span is not None]
            unused = next((s for s in parsed.file.statements if _declares_name_at(s, spans)), None)
            if unused is None:
                return source
            source = replace(source, text=source.text[: unused.span.start] + source.text[unused.span.end :])

    def session_with_text(self, text: str, path: Path | None = None) -> "Session":
        """Session of the wish's recipe, or of one at `path`, with another text."""
        path = path or self.session.path
        return replace(self.session, path=path, texts={**self.session.texts, path.resolve(): text})


def is_open(step: Step) -> bool:
    return step.call.word == OPEN_STEPS


def model_emits(session: "Session", pipeline: Pipeline) -> list[Emit]:
    """Targets of a pipeline that hold a model."""
    return [emit for emit in pipeline.emits if not session.registry.describes_artifacts(emit.call.word)]


def metric_on_data(metric: MetricRef, data: DataRef) -> MetricRef:
    """The metric on other rows; one that reads none as it is."""
    return replace(metric, args=tuple((n, data if isinstance(v, DataRef) else v) for n, v in metric.args))


@lru_cache(256)
def _metric_text_on_data(metric: MetricRef, data: DataRef) -> str:
    return value_text(metric_on_data(metric, data))


def read_wish(session: "Session") -> Wish:
    """The wish in a recipe. Raises Reject (not-open) for one without open steps, or with several."""
    recipes, warnings = session.recipes_and_warnings(resolve=True)
    opened = [(r, p, s) for r in recipes for p in r.pipelines.values() for s in p.steps if is_open(s)]
    if not opened:
        raise not_open(
            f"{session.path} has no open steps",
            help="write `best = search.steps(optimize: decode.p50, ...)`, or name a model instead of a recipe",
        ).rejection()
    recipe, pipeline, step = opened[0]
    if len(recipes) > 1:
        message = f"steps of one variant are searched, and the recipe has {len(recipes)}"
        raise not_open(message, step.call.span, help="choose one by `--set NAME=VALUE`").rejection()
    if len(opened) > 1:
        also_open = tuple((s.call.span, "here, too") for _, _, s in opened[1:] if s.call.span)
        message = "steps are open in several places"
        raise not_open(message, step.call.span, related=also_open, help="name one by `--pipeline`").rejection()
    for warning in warnings:
        session.settings.on_event(Warned(warning))
    return Wish(session, recipe, pipeline, step, model_emits(session, pipeline)[0], warnings)


def _spans_of_open_step_and_target(source: Source, pipeline: str, step: str, target: Invocation) -> tuple[Span, Span]:
    """Places of the open step and of the target's call in a recipe's text."""
    step_span: Span | None = None
    for statement in parse(source).file.statements:
        if isinstance(statement, ast.Pipeline) and statement.name.path == pipeline:
            step_span = next(s.span for s in statement.steps if s.name.path == step)
    assert step_span is not None and target.span is not None, "a checked recipe has its open step and its target"
    return step_span, target.span


def _declares_name_at(statement: ast.Statement, spans: Sequence[Span]) -> bool:
    return isinstance(statement, (ast.Declare, ast.Use, ast.Param, ast.Profile)) and any(
        statement.span.start <= span.start < statement.span.end for span in spans
    )

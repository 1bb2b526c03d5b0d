"""Occurrences of a recipe's names: definition, references, rename and the outline ask here."""

from collections.abc import Iterator
from dataclasses import dataclass

from ....dsl.checker.modules import resolved_module_name
from ....dsl.checker.vocabulary import Param, Vocabulary, Word
from ....dsl.syntax import ast
from ....dsl.syntax.source import Span


@dataclass(frozen=True)
class Occurrence:
    """A name at a place.

    home       file that declares it: the name of a source, or of a module as `use` has it
    pipeline   whose step it is, "" for a name of the file
    kind       "param", "model", "data", "profile", "pipeline", "module" or "step"; "" where only its file knows
    """

    home: str
    pipeline: str
    name: str
    span: Span
    kind: str = ""
    declares: bool = False

    @property
    def key(self) -> tuple[str, str, str]:
        return self.home, self.pipeline, self.name


def occurrences(file: ast.File, vocabulary: Vocabulary) -> list[Occurrence]:
    """Every name of a file that the recipe itself declares, in order of place."""
    named = [o for o in _Walk(file, vocabulary).all() if o.name]
    return sorted(dict.fromkeys(named), key=lambda o: o.span.start)


def occurrence_at(candidates: list[Occurrence], offset: int) -> Occurrence | None:
    """The name that an offset lies in, or just behind."""
    return next((o for o in candidates if o.span.start <= offset <= o.span.end), None)


class _Walk:
    def __init__(self, file: ast.File, vocabulary: Vocabulary):
        self.file, self.vocabulary, self.source_name = file, vocabulary, file.source.name
        self.kinds: dict[str, str] = {}
        self.modules: dict[str, str] = {}
        self.steps: dict[str, set[str]] = {}
        for statement in file.statements:
            match statement:
                case ast.Use(target, alias):
                    name = (
                        alias.path if alias else target.path.rpartition(".")[2] if isinstance(target, ast.Name) else ""
                    )
                    self.modules[name] = resolved_module_name(target, self.source_name)
                    self.kinds[name] = "module"
                case ast.Param(name):
                    self.kinds.setdefault(name.path, "param")
                case ast.Declare(kind, name):
                    self.kinds.setdefault(name.path, kind)
                case ast.Profile(name):
                    self.kinds.setdefault(name.path, "profile")
                case ast.Pipeline(name):
                    self.kinds.setdefault(name.path, "pipeline")
                    self.steps[name.path] = {step.name.path for step in statement.steps}

    def all(self) -> Iterator[Occurrence]:
        for statement in self.file.statements:
            yield from self.statement(statement)

    def statement(self, statement: ast.Statement) -> Iterator[Occurrence]:
        match statement:
            case ast.Use(target, alias):
                if alias:
                    yield self.declared(alias, "module")
                elif isinstance(target, ast.Name):  # `std.text` is called `text`
                    name = target.path.rpartition(".")[2]
                    last = Span(target.span.source, target.span.end - len(name), target.span.end)
                    yield Occurrence(self.source_name, "", name, last, "module", True)
            case ast.Param(name, _, default, bounds):
                yield self.declared(name, "param")
                yield from self.value(default, None, "")
                if bounds:
                    yield from self.value(bounds, None, "")
            case ast.Declare(kind, name, call):
                yield self.declared(name, kind)
                yield from self.call(call, self.vocabulary.word(kind, call.name.path), "")
            case ast.Profile(name, entries):
                yield self.declared(name, "profile")
                for entry in entries:
                    yield from self.value(entry.value, None, "")
            case ast.Matrix(entries):
                for entry in entries:
                    yield from self.name(entry.name, "")
                    yield from self.value(entry.value, None, "")
            case ast.Pipeline(name, model, _, steps):
                yield self.declared(name, "pipeline")
                yield from self.name(model, "")
                for step in steps:
                    yield Occurrence(self.source_name, name.path, step.name.path, step.name.span, "step", True)
                    yield from self.step(step.call, name.path)
            case ast.Expect(pipeline, bounds):
                yield from self.name(pipeline, "")
                for bound in bounds:
                    yield from self.bound(bound, pipeline.path)
            case ast.Emit(pipeline, targets):
                yield from self.name(pipeline, "")
                for call in targets:
                    yield from self.call(call, self.vocabulary.word("target", call.name.path), pipeline.path)

    def declared(self, name: ast.Name, kind: str) -> Occurrence:
        return Occurrence(self.source_name, "", name.path, name.span, kind, True)

    def bound(self, bound: ast.Bound, pipeline: str) -> Iterator[Occurrence]:
        if isinstance(bound.metric, ast.Call):
            yield from self.call(bound.metric, self.vocabulary.word("metric", bound.metric.name.path), "")
        yield from self.value(bound.limit.amount, None, "")
        for name in (bound.limit.baseline, bound.profile):
            if name:
                yield from self.name(name, "")
        if bound.part and bound.part.path in self.steps.get(pipeline, ()):
            yield from self.name(bound.part, pipeline)

    def step(self, call: ast.Call, pipeline: str) -> Iterator[Occurrence]:
        alias, dot, _ = call.name.path.partition(".")
        if not dot or alias not in self.modules:
            yield from self.call(call, self.vocabulary.word("pass", call.name.path), pipeline)
            return
        yield from self.name(call.name, pipeline)
        for arg in call.args:
            if arg.name_span and arg.name != "from":
                yield Occurrence(self.modules[alias], "", arg.name, arg.name_span)
            yield from self.value(arg.value, None, pipeline)

    def call(self, call: ast.Call, plugin: Word | None, pipeline: str) -> Iterator[Occurrence]:
        slots = [p for p in plugin.params if p.positional] if plugin else []
        for arg in call.args:
            param = plugin.param(arg.name) if plugin and arg.name else slots.pop(0) if slots and not arg.name else None
            yield from self.value(arg.value, param, pipeline)

    def value(self, expr: ast.Expr, param: Param | None, pipeline: str) -> Iterator[Occurrence]:
        match expr:
            case ast.Name(path):
                if param is None or path not in param.choices:
                    yield from self.name(expr, pipeline)
            case ast.Call():
                yield from self.call(expr, self.vocabulary.word("metric", expr.name.path), "")
            case ast.Items(items):
                for item in items:
                    yield from self.value(item, param, pipeline)
            case ast.Pairs(entries):
                for entry in entries:
                    yield from self.value(entry.value, None, pipeline)
            case ast.Interval(low, high):
                yield from self.value(low, param, pipeline)
                yield from self.value(high, param, pipeline)
            case ast.Of(amount, _):
                yield from self.value(amount, param, pipeline)

    def name(self, name: ast.Name, pipeline: str) -> Iterator[Occurrence]:
        """Occurrences of a name: a step of the pipeline, a name of the file, or one of a module."""
        path, span = name.path, name.span
        if path in self.steps.get(pipeline, ()):
            yield Occurrence(self.source_name, pipeline, path, span, "step")
        elif path in self.kinds:
            yield Occurrence(self.source_name, "", path, span, self.kinds[path])
        elif "." in path and (alias := path.partition(".")[0]) in self.modules:
            middle = span.start + len(alias)
            yield Occurrence(self.source_name, "", alias, Span(span.source, span.start, middle), "module")
            yield Occurrence(self.modules[alias], "", path[len(alias) + 1 :], Span(span.source, middle + 1, span.end))

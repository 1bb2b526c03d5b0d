"""Pages of words for a person who points at one: what `effc explain` says, and what holds here."""

from collections.abc import Iterator
from typing import NamedTuple

from ....dsl.checker.vocabulary import Param, Vocabulary, Word
from ....dsl.syntax import ast
from ....dsl.syntax.source import Span
from ..explain import default_text, parameter_lines, word_page

_KINDS = {"pipeline": "pass", "emit": "target", "expect": "metric"}


def page(plugin: Word) -> str:
    """The page of a word in Markdown: sentences as they are, tables and lists as they stand."""
    title, _, body = word_page(plugin).partition("\n")
    return f"**{title}**\n\n{_doc_to_markdown(body)}"


def _doc_to_markdown(text: str) -> str:
    """Paragraphs of prose, and every other as a block that keeps its columns."""
    out = []
    for block in text.strip().split("\n\n"):
        lines = block.split("\n")
        if lines[0].startswith("Example:"):
            out.append(f"```effspec\n{block.removeprefix('Example:').strip()}\n```")
        elif any(line.startswith(" ") for line in lines):
            out.append(f"```text\n{block}\n```")
        else:
            out.append("  \n".join(lines) if lines[0].startswith("Source:") else " ".join(lines))
    return "\n\n".join(out)


def parameter_text(param: Param) -> str:
    """A parameter in Markdown."""
    head, _, doc = parameter_lines(param).strip().partition("\n")
    return f"**{head}**\n\n{doc.strip()}"


class ParameterValue(NamedTuple):
    name: str
    text: str
    is_explicit: bool


def parameter_values(plugin: Word, call: ast.Call) -> list[ParameterValue]:
    """(parameter, its value here, whether the recipe gives it), defaults filled in."""
    explicit = {arg.name: arg.value.span.text for arg in call.args if arg.name}
    bare = [arg.value.span.text for arg in call.args if not arg.name]
    explicit |= dict(zip((p.name for p in plugin.params if p.positional), bare, strict=False))
    return [
        ParameterValue(p.name, explicit.get(p.name, "" if p.required else default_text(p)), p.name in explicit)
        for p in plugin.params
        if p.name in explicit or not p.required
    ]


def plugin_calls(file: ast.File, vocabulary: Vocabulary) -> Iterator[tuple[ast.Call, Word]]:
    """Every call of a word in a file, metrics in arguments and bounds included."""
    for statement in file.statements:
        match statement:
            case ast.Declare(kind, _, call):
                yield from _call(kind, call, vocabulary)
            case ast.Pipeline():
                for step in statement.steps:
                    yield from _call("pass", step.call, vocabulary)
            case ast.Emit():
                for call in statement.targets:
                    yield from _call("target", call, vocabulary)
            case ast.Expect():
                for bound in statement.bounds:
                    metric = bound.metric
                    lone = metric if isinstance(metric, ast.Call) else ast.Call(metric, (), span=metric.span)
                    yield from _call("metric", lone, vocabulary)


def _call(kind: str, call: ast.Call, vocabulary: Vocabulary) -> Iterator[tuple[ast.Call, Word]]:
    if word := vocabulary.word(kind, call.name.path):
        yield call, word
    for arg in call.args:
        for inner in _metric_calls(arg.value, vocabulary):
            yield from _call("metric", inner, vocabulary)


def _metric_calls(expr: ast.Expr, vocabulary: Vocabulary) -> Iterator[ast.Call]:
    match expr:
        case ast.Call():
            yield expr
        case ast.Name(path) if path in vocabulary.words("metric"):
            yield ast.Call(expr, (), span=expr.span)
        case ast.Items(items):
            for item in items:
                yield from _metric_calls(item, vocabulary)


def span_contains_offset(span: Span | None, offset: int) -> bool:
    return span is not None and span.start <= offset <= span.end

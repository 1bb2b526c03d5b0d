"""Hover text of the word, the parameter or the name under a cursor."""

from pathlib import Path

from lsprotocol import types as lsp

from ....dsl.checker.modules import resolved_module_name
from ....dsl.checker.vocabulary import Vocabulary, Word
from ....dsl.syntax import ast
from ....dsl.syntax.source import Span
from .names import Occurrence, occurrence_at, occurrences
from .open_documents import OpenDocuments, Reading
from .word_pages import page, parameter_text, parameter_values, plugin_calls, span_contains_offset


def make_hover(reading: Reading, offset: int, documents: OpenDocuments) -> lsp.Hover | None:
    for call, word in plugin_calls(reading.file, documents.vocabulary):
        if span_contains_offset(call.name.span, offset):
            return _hover(reading, call.name.span, page(word) + _parameter_values_text(word, call))
        for arg in call.args:
            param = word.param(arg.name) if arg.name else None
            if param and span_contains_offset(arg.name_span, offset):
                return _hover(reading, arg.name_span or arg.span, parameter_text(param))
            chosen = param and isinstance(arg.value, ast.Name) and arg.value.path in param.choices
            if param and chosen and span_contains_offset(arg.value.span, offset):
                return _hover(reading, arg.value.span, parameter_text(param))
    occurrence = occurrence_at(occurrences(reading.file, documents.vocabulary), offset)
    declared = find_declaration_of(occurrence, reading, documents) if occurrence else None
    if occurrence is None or declared is None:
        return None
    return _hover(reading, occurrence.span, _declaration_text(*declared, documents.vocabulary))


def file_of_use_at(reading: Reading, offset: int, documents: OpenDocuments) -> Path | None:
    """The file of the module whose `use` an offset lies in."""
    uses = (s for s in reading.file.statements if isinstance(s, ast.Use) and span_contains_offset(s.span, offset))
    use = next(uses, None)
    return documents.module_path(resolved_module_name(use.target, reading.source.name), reading.path) if use else None


def find_declaration_of(
    occurrence: Occurrence, reading: Reading, documents: OpenDocuments
) -> tuple[Reading, Occurrence] | None:
    """Declaration of a name, in this file or in the module that it belongs to."""
    home: Reading | None = reading
    if occurrence.home != reading.source.name:
        path = documents.module_path(occurrence.home, reading.path)
        home = documents.parse_any_file(path) if path else None
    if home is None:
        return None
    candidates = occurrences(home.file, documents.vocabulary)
    key = (home.source.name, *occurrence.key[1:])
    return next(((home, o) for o in candidates if o.declares and o.key == key), None)


def _declaration_text(home: Reading, occurrence: Occurrence, vocabulary: Vocabulary) -> str:
    """The line that declares a name; of a call, with the values that it comes to."""
    for statement in home.file.statements:
        steps = statement.steps if isinstance(statement, ast.Pipeline) else ()
        for node in (statement, *steps):
            name = getattr(node, "name", None)
            if name is not None and name.span == occurrence.span:
                return _node_text(node, vocabulary)
    return f"```effspec\n{occurrence.name}\n```"


def _node_text(node, vocabulary: Vocabulary) -> str:
    text = node.span.text
    if isinstance(node, ast.Pipeline):
        text = f"pipeline {node.name.path}({node.model.path}) {{ ... }}"
    markdown = f"```effspec\n{text}\n```"
    if isinstance(node, ast.Param) and node.doc:
        markdown += f"\n\n{node.doc.value}"
    if isinstance(node, (ast.Declare, ast.Step)):
        word = vocabulary.word(node.kind if isinstance(node, ast.Declare) else "pass", node.call.name.path)
        markdown += f"\n\n{word.summary}" + _parameter_values_text(word, node.call) if word else ""
    return markdown


def _parameter_values_text(plugin: Word, call: ast.Call) -> str:
    """The parameters as they are here: what is given, and the defaults of the rest."""
    rows = parameter_values(plugin, call)
    if not rows:
        return ""
    lines = [f"{name}: {value}" + ("" if is_explicit else "    # default") for name, value, is_explicit in rows]
    return "\n\nHere:\n```effspec\n" + "\n".join(lines) + "\n```"


def _hover(reading: Reading, span: Span, text: str) -> lsp.Hover:
    return lsp.Hover(lsp.MarkupContent(lsp.MarkupKind.Markdown, text), reading.lines.range(span))

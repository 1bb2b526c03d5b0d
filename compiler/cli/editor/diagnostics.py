"""Diagnostics of `effc check` for an editor, and their fixes as code actions."""

from lsprotocol import types as lsp
from pygls import uris

from ....dsl.syntax import ast
from ....dsl.syntax.diagnostics import Diagnostic
from ....dsl.syntax.source import Source, Span
from .open_documents import Reading
from .positions import Lines

SEVERITY = {
    "error": lsp.DiagnosticSeverity.Error,
    "warning": lsp.DiagnosticSeverity.Warning,
    "note": lsp.DiagnosticSeverity.Information,
}
_UNUSED = ("unused-name", "unused-step")


def document_diagnostics(reading: Reading) -> list[lsp.Diagnostic]:
    """Every diagnostic of a recipe; those of a module that it uses stand at its `use`."""
    return [_to_lsp_diagnostic(diagnostic, reading) for diagnostic in reading.diagnostics]


def _to_lsp_diagnostic(diagnostic: Diagnostic, reading: Reading) -> lsp.Diagnostic:
    span = _span_in_document(diagnostic, reading)
    related = [(where, message) for where, message in diagnostic.related if where]
    if diagnostic.span and diagnostic.span.source.name != reading.source.name:
        related.insert(0, (diagnostic.span, diagnostic.message))
    lines = [
        diagnostic.message,
        *(f"note: {diagnostic.note}" for _ in diagnostic.note and "1"),
        *([f"help: {diagnostic.help}"] if diagnostic.help else []),
    ]
    return lsp.Diagnostic(
        reading.lines.range(span),
        "\n".join(lines),
        SEVERITY[diagnostic.severity],
        diagnostic.slug,
        source="effc",
        tags=[lsp.DiagnosticTag.Unnecessary] if diagnostic.slug in _UNUSED else None,
        related_information=[_related_information(where, message) for where, message in related] or None,
    )


def _span_in_document(diagnostic: Diagnostic, reading: Reading) -> Span:
    """The place in this file: its own, the `use` of the module where it lies, or the first line."""
    if diagnostic.span is None:
        return Span(reading.source, 0, len(reading.source.text.split("\n", 1)[0]))
    if diagnostic.span.source.name == reading.source.name:
        return diagnostic.span
    uses = [s for s in reading.file.statements if isinstance(s, ast.Use)]
    named = [u for u in uses if diagnostic.span.source.name.endswith(_file_name_of_used_module(u))] or uses
    return named[0].span if named else Span(reading.source, 0, 0)


def _file_name_of_used_module(use: ast.Use) -> str:
    """Last component of a used file's path."""
    if isinstance(use.target, ast.Text):
        return use.target.value.rpartition("/")[2]
    return f"{use.target.path.rpartition('.')[2]}.effspec"


def _related_information(span: Span, message: str) -> lsp.DiagnosticRelatedInformation:
    return lsp.DiagnosticRelatedInformation(
        lsp.Location(uri_of(span.source), Lines(span.source.text).range(span)), message
    )


def uri_of(source: Source) -> str:
    return uris.from_fs_path(source.name) or source.name


def quick_fixes(reading: Reading, selected: lsp.Range, uri: str) -> list[lsp.CodeAction]:
    """Corrections of the mistakes at a place: those that are sure are preferred; and all sure ones at once."""
    lines, result = reading.lines, []
    start, end = lines.offset(selected.start), lines.offset(selected.end)
    for diagnostic in reading.diagnostics:
        span = _span_in_document(diagnostic, reading)
        fix = diagnostic.fix or diagnostic.offer
        if fix is None or fix.span.source.name != reading.source.name or span.end < start or end < span.start:
            continue
        edit = lsp.TextEdit(lines.range(fix.span), fix.text)
        result.append(
            lsp.CodeAction(
                _quick_fix_title(diagnostic, fix.span.text, fix.text),
                lsp.CodeActionKind.QuickFix,
                diagnostics=[_to_lsp_diagnostic(diagnostic, reading)],
                is_preferred=diagnostic.fix is not None,
                edit=lsp.WorkspaceEdit({uri: [edit]}),
            )
        )
    sure = {d.fix for d in reading.diagnostics if d.fix and d.fix.span.source.name == reading.source.name}
    if len(sure) > 1:
        result.append(_fix_all_action(reading, uri))
    return result


def _quick_fix_title(diagnostic: Diagnostic, replaced_text: str, new_text: str) -> str:
    if not new_text.strip():
        return f"Remove `{replaced_text.strip()}`" if replaced_text.strip() else "Remove the space"
    if not replaced_text.strip():
        return f"Insert `{new_text.strip()}`"
    return f"Write `{new_text.strip()}`"


def _fix_all_action(reading: Reading, uri: str) -> lsp.CodeAction:
    """Code action that applies all fixes, as `effc check --fix` does."""
    from ....dsl.syntax.render import apply_fixes

    text = apply_fixes(reading.source.text, reading.diagnostics)
    edit = lsp.TextEdit(reading.lines.full_range, text)
    return lsp.CodeAction(
        "Correct all mistakes whose correction is sure",
        lsp.CodeActionKind.SourceFixAll,
        edit=lsp.WorkspaceEdit({uri: [edit]}),
    )

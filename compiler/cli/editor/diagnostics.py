"""What `effc check` says, as an editor shows it; and the corrections that it can put in."""

from lsprotocol import types as lsp
from pygls import uris

from ....dsl.syntax import ast
from ....dsl.syntax.diagnostics import Diagnostic
from ....dsl.syntax.source import Source, Span
from .positions import Lines
from .workspace import Reading

SEVERITY = {
    "error": lsp.DiagnosticSeverity.Error,
    "warning": lsp.DiagnosticSeverity.Warning,
    "note": lsp.DiagnosticSeverity.Information,
}
_UNUSED = ("unused-name", "unused-step")


def shown(reading: Reading) -> list[lsp.Diagnostic]:
    """Every diagnostic of a recipe; those of a module that it uses stand at its `use`."""
    return [_one(diagnostic, reading) for diagnostic in reading.diagnostics]


def _one(found: Diagnostic, reading: Reading) -> lsp.Diagnostic:
    span = _here(found, reading)
    related = [(where, said) for where, said in found.related if where]
    if found.span and found.span.source.name != reading.source.name:
        related.insert(0, (found.span, found.message))
    lines = [
        found.message,
        *(f"note: {found.note}" for _ in found.note and "1"),
        *([f"help: {found.help}"] if found.help else []),
    ]
    return lsp.Diagnostic(
        reading.lines.range(span),
        "\n".join(lines),
        SEVERITY[found.severity],
        found.slug,
        source="effc",
        tags=[lsp.DiagnosticTag.Unnecessary] if found.slug in _UNUSED else None,
        related_information=[_related(where, said) for where, said in related] or None,
    )


def _here(found: Diagnostic, reading: Reading) -> Span:
    """The place in this file: its own, the `use` of the module where it lies, or the first line."""
    if found.span is None:
        return Span(reading.source, 0, len(reading.source.text.split("\n", 1)[0]))
    if found.span.source.name == reading.source.name:
        return found.span
    uses = [s for s in reading.file.statements if isinstance(s, ast.Use)]
    named = [u for u in uses if found.span.source.name.endswith(_tail(u))] or uses
    return named[0].span if named else Span(reading.source, 0, 0)


def _tail(use: ast.Use) -> str:
    """What the path of a used file ends with."""
    if isinstance(use.target, ast.Text):
        return use.target.value.rpartition("/")[2]
    return f"{use.target.path.rpartition('.')[2]}.effspec"


def _related(span: Span, said: str) -> lsp.DiagnosticRelatedInformation:
    return lsp.DiagnosticRelatedInformation(
        lsp.Location(uri_of(span.source), Lines(span.source.text).range(span)), said
    )


def uri_of(source: Source) -> str:
    return uris.from_fs_path(source.name) or source.name


def actions(reading: Reading, asked: lsp.Range, uri: str) -> list[lsp.CodeAction]:
    """Corrections of the mistakes at a place: those that are sure are preferred; and all sure ones at once."""
    lines, found = reading.lines, []
    start, end = lines.offset(asked.start), lines.offset(asked.end)
    for diagnostic in reading.diagnostics:
        span = _here(diagnostic, reading)
        fix = diagnostic.fix or diagnostic.offer
        if fix is None or fix.span.source.name != reading.source.name or span.end < start or end < span.start:
            continue
        edit = lsp.TextEdit(lines.range(fix.span), fix.text)
        found.append(
            lsp.CodeAction(
                _title(diagnostic, fix.span.text, fix.text),
                lsp.CodeActionKind.QuickFix,
                diagnostics=[_one(diagnostic, reading)],
                is_preferred=diagnostic.fix is not None,
                edit=lsp.WorkspaceEdit({uri: [edit]}),
            )
        )
    sure = {d.fix for d in reading.diagnostics if d.fix and d.fix.span.source.name == reading.source.name}
    if len(sure) > 1:
        found.append(_all(reading, uri))
    return found


def _title(found: Diagnostic, before: str, after: str) -> str:
    if not after.strip():
        return f"Remove `{before.strip()}`" if before.strip() else "Remove the space"
    if not before.strip():
        return f"Insert `{after.strip()}`"
    return f"Write `{after.strip()}`"


def _all(reading: Reading, uri: str) -> lsp.CodeAction:
    """What `effc check --fix` writes."""
    from ....dsl.syntax.render import apply_fixes

    text = apply_fixes(reading.source.text, reading.diagnostics)
    edit = lsp.TextEdit(reading.lines.whole, text)
    return lsp.CodeAction(
        "Correct all mistakes whose correction is sure",
        lsp.CodeActionKind.SourceFixAll,
        edit=lsp.WorkspaceEdit({uri: [edit]}),
    )

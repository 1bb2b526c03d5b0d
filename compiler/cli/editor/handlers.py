"""The requests of the protocol, each answered by the file of its noun."""

import os
import sys
from typing import BinaryIO, cast

from lsprotocol import types as lsp
from pygls.exceptions import JsonRpcInvalidParams

from ....dsl.syntax.diagnostics import Reject
from ....dsl.syntax.format import format_source
from .completion import completion_list
from .diagnostics import quick_fixes
from .hints import inlay_hints
from .hover import file_of_use_at, find_declaration_of, make_hover
from .names import occurrence_at, occurrences
from .open_documents import path_of
from .outline import document_symbols, folding_ranges
from .rename import InvalidName, renamable_occurrence, rename_everywhere, uri_of
from .server import Input, Server


def run_language_server() -> int:
    """Serve the language server protocol over stdio until the editor leaves. Nothing but the protocol goes to stdout:
    what a library prints there goes to stderr."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    server = Server()
    for listen in (
        _register_document_handlers,
        _register_name_handlers,
        _register_hover_and_completion,
        _register_format_and_outline,
    ):
        listen(server)
    try:
        server.start_io(cast(BinaryIO, Input(sys.stdin.buffer)), out)
    finally:
        server.forecasts.end()
    return 0


def _register_document_handlers(server: Server) -> None:
    @server.feature(lsp.INITIALIZE)
    def on_open(params: lsp.InitializeParams) -> None:
        server.begin(params.initialization_options)

    @server.feature(lsp.TEXT_DOCUMENT_DID_OPEN)
    def open_text(params: lsp.DidOpenTextDocumentParams) -> None:
        server.take(params.text_document.uri)
        server.publish(params.text_document.uri)

    @server.feature(lsp.TEXT_DOCUMENT_DID_CHANGE)
    async def changed(params: lsp.DidChangeTextDocumentParams) -> None:
        server.take(params.text_document.uri)
        await server.publish_soon(params.text_document.uri, params.text_document.version)

    @server.feature(lsp.TEXT_DOCUMENT_DID_SAVE)
    def saved(params: lsp.DidSaveTextDocumentParams) -> None:
        server.publish_all()

    @server.feature(lsp.WORKSPACE_DID_CHANGE_WATCHED_FILES)
    def elsewhere(params: lsp.DidChangeWatchedFilesParams) -> None:
        server.publish_all()

    @server.feature(lsp.TEXT_DOCUMENT_DID_CLOSE)
    def closed(params: lsp.DidCloseTextDocumentParams) -> None:
        server.documents.close(path_of(params.text_document.uri))
        server.text_document_publish_diagnostics(lsp.PublishDiagnosticsParams(params.text_document.uri, []))


def _register_name_handlers(server: Server) -> None:
    @server.feature(lsp.TEXT_DOCUMENT_DEFINITION)
    def definition(params: lsp.DefinitionParams) -> lsp.Location | None:
        reading = server.reading(params.text_document.uri)
        offset = reading.lines.offset(params.position)
        if module := file_of_use_at(reading, offset, server.documents):
            return lsp.Location(uri_of(module), lsp.Range(lsp.Position(0, 0), lsp.Position(0, 0)))
        occurrence = occurrence_at(occurrences(reading.file, server.documents.vocabulary), offset)
        declared = find_declaration_of(occurrence, reading, server.documents) if occurrence else None
        if declared is None:
            return None
        home, one = declared
        return lsp.Location(uri_of(home.path), home.lines.range(one.span))

    @server.feature(lsp.TEXT_DOCUMENT_REFERENCES)
    def references(params: lsp.ReferenceParams) -> list[lsp.Location]:
        reading = server.reading(params.text_document.uri)
        occurrence = occurrences(reading.file, server.documents.vocabulary)
        current = occurrence_at(occurrence, reading.lines.offset(params.position))
        return [
            lsp.Location(params.text_document.uri, reading.lines.range(o.span))
            for o in occurrence
            if current and o.key == current.key
        ]

    @server.feature(lsp.TEXT_DOCUMENT_PREPARE_RENAME)
    def prepare(params: lsp.PrepareRenameParams) -> lsp.Range | None:
        reading = server.reading(params.text_document.uri)
        occurrence = renamable_occurrence(reading, reading.lines.offset(params.position), server.documents)
        return reading.lines.range(occurrence.span) if occurrence else None

    @server.feature(lsp.TEXT_DOCUMENT_RENAME, lsp.RenameOptions(prepare_provider=True))
    def renamed(params: lsp.RenameParams) -> lsp.WorkspaceEdit:
        reading = server.reading(params.text_document.uri)
        try:
            return rename_everywhere(reading, reading.lines.offset(params.position), params.new_name, server.documents)
        except InvalidName as error:
            raise JsonRpcInvalidParams(str(error)) from None


def _register_hover_and_completion(server: Server) -> None:
    @server.feature(lsp.TEXT_DOCUMENT_HOVER)
    def hover_at(params: lsp.HoverParams) -> lsp.Hover | None:
        reading = server.reading(params.text_document.uri)
        return make_hover(reading, reading.lines.offset(params.position), server.documents)

    @server.feature(lsp.TEXT_DOCUMENT_COMPLETION, lsp.CompletionOptions(trigger_characters=[".", '"', ":", "=", "("]))
    def completed(params: lsp.CompletionParams) -> lsp.CompletionList:
        reading = server.reading(params.text_document.uri)
        return completion_list(reading, reading.lines.offset(params.position), server.documents)

    @server.feature(
        lsp.TEXT_DOCUMENT_CODE_ACTION,
        lsp.CodeActionOptions([lsp.CodeActionKind.QuickFix, lsp.CodeActionKind.SourceFixAll]),
    )
    def corrected(params: lsp.CodeActionParams) -> list[lsp.CodeAction]:
        uri = params.text_document.uri
        return quick_fixes(server.reading(uri), params.range, uri)


def _register_format_and_outline(server: Server) -> None:
    @server.feature(lsp.TEXT_DOCUMENT_FORMATTING)
    def formatted(params: lsp.DocumentFormattingParams) -> list[lsp.TextEdit] | None:
        reading = server.reading(params.text_document.uri)
        try:
            text = format_source(reading.source)
        except Reject:  # torn: its diagnostics say where
            return None
        return [] if text == reading.source.text else [lsp.TextEdit(reading.lines.full_range, text)]

    @server.feature(lsp.TEXT_DOCUMENT_INLAY_HINT)
    def hinted(params: lsp.InlayHintParams) -> list[lsp.InlayHint]:
        reading = server.reading(params.text_document.uri)
        all_hints = inlay_hints(reading, server.forecasts, server.documents, server.options["defaults"])
        return [h for h in all_hints if params.range.start.line <= h.position.line <= params.range.end.line]

    @server.feature(lsp.TEXT_DOCUMENT_DOCUMENT_SYMBOL)
    def outlined(params: lsp.DocumentSymbolParams) -> list[lsp.DocumentSymbol]:
        return document_symbols(server.reading(params.text_document.uri))

    @server.feature(lsp.TEXT_DOCUMENT_FOLDING_RANGE)
    def folded(params: lsp.FoldingRangeParams) -> list[lsp.FoldingRange]:
        return folding_ranges(server.reading(params.text_document.uri))

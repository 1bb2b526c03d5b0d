"""The statements and steps of a recipe, as editors list and fold them."""

from lsprotocol import types as lsp

from ....dsl.syntax import ast
from .open_documents import Reading

Kind = lsp.SymbolKind
_KINDS = {"model": Kind.Class, "data": Kind.Array}


def document_symbols(reading: Reading) -> list[lsp.DocumentSymbol]:
    symbols = []
    for statement in reading.file.statements:
        match statement:
            case ast.Param(name):
                symbols.append(_symbol(reading, name, statement, Kind.Constant, "param"))
            case ast.Declare(kind, name):
                symbols.append(_symbol(reading, name, statement, _KINDS[kind], kind))
            case ast.Profile(name):
                symbols.append(_symbol(reading, name, statement, Kind.Struct, "profile"))
            case ast.Pipeline(name, _, _, steps):
                symbol_of_pipeline = _symbol(reading, name, statement, Kind.Function, "pipeline")
                symbol_of_pipeline.children = [
                    _symbol(reading, s.name, s, Kind.Variable, s.call.name.path) for s in steps
                ]
                symbols.append(symbol_of_pipeline)
            case ast.Expect(name) | ast.Emit(name):
                word = type(statement).__name__.lower()
                symbols.append(_symbol(reading, name, statement, Kind.Event, "", f"{word} {name.path}"))
    return [symbol for symbol in symbols if symbol.name]


def _symbol(
    reading: Reading, name: ast.Name, node, kind: lsp.SymbolKind, detail: str, label: str = ""
) -> lsp.DocumentSymbol:
    lines = reading.lines
    return lsp.DocumentSymbol(label or name.path, kind, lines.range(node.span), lines.range(name.span), detail)


def folding_ranges(reading: Reading) -> list[lsp.FoldingRange]:
    spans = [reading.lines.range(s.span) for s in reading.file.statements]
    return [lsp.FoldingRange(r.start.line, r.end.line) for r in spans if r.end.line > r.start.line]

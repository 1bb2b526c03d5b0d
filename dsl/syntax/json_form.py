"""The syntax tree as plain JSON, both ways, so that other tools can read and make recipes.

A node is an object: `{"node": "Of", "amount": {"node": "Name", "path": "keep"}, "base": "channels"}`. Where only
a name may stand it is a string; where a value may stand, strings, booleans, numbers and lists are what they
are in JSON, and a name is `{"node": "Name", "path": "calib"}`.
"""

import json
import re
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from . import ast
from .diagnostics import Diagnostic, Fault, Reject
from .format import format_file
from .parse import parse
from .source import Source, Span

json_form = Fault("json-form", "JSON that should hold a recipe has another form.")

FORMAT = 1
_name = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
NODES = {
    c.__name__: c
    for c in (
        *get_args(ast.Expr),
        *get_args(ast.Statement),
        ast.Arg,
        ast.Entry,
        ast.Step,
        ast.Limit,
        ast.Bound,
        ast.Comment,
    )
}


def file_to_json(file: ast.File, with_spans: bool = False) -> dict:
    """`with_spans` adds `"span": [start, end]`, in characters, to every node, strings and lists included."""
    return {
        "format": FORMAT,
        "edition": file.edition,
        "doc": file.doc and file.doc.value,
        "statements": [_node_or_plain_value_to_json(s, with_spans) for s in file.statements],
        "comments": [_node_or_plain_value_to_json(c, True) for c in file.comments] if with_spans else [],
    }


def file_from_json_text(source: Source) -> ast.File:
    """The recipe of a JSON text. Raises Reject."""
    try:
        data = json.loads(source.text)
    except ValueError as error:
        at = min(getattr(error, "pos", 0), max(len(source.text) - 1, 0))
        reason = str(error).partition(":")[0].lower()
        raise json_form(
            f"this is no JSON: {reason}", Span(source, at, min(at + 1, len(source.text)))
        ).rejection() from None
    except RecursionError:
        raise json_form(f"`{source.name}` is nested too deep").rejection() from None
    return file_from_json(data, source.name)


def file_from_json(data: Any, name: str = "recipe.json") -> ast.File:
    """The recipe that JSON describes; its spans lie in its canonical text. Raises Reject on other JSON."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise _type_error("$", f'an object with `"format": {FORMAT}`', data).rejection()
    nowhere = Span(Source(name, ""), 0, 0)
    doc = data.get("doc")
    if not (doc is None or isinstance(doc, str)):
        raise _type_error("$.doc", "a string or null", doc).rejection()
    statements = data.get("statements")
    if not isinstance(statements, list):
        raise _type_error("$.statements", "a list", statements).rejection()
    reading = _Reading(nowhere)
    file = ast.File(
        nowhere.source,
        data.get("edition", 1),
        ast.Text(doc, span=nowhere) if doc is not None else None,
        tuple(reading.read_node_within_depth(s, ast.Statement, f"$.statements[{i}]") for i, s in enumerate(statements)),
    )
    return reparse_canonical_text(file, name)


def reparse_canonical_text(file: ast.File, name: str) -> ast.File:
    """The file read back from its text, so that every node has a place. Raises Reject if it differs."""
    text = format_file(file)
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise json_form("a string holds half of a surrogate pair, which UTF-8 cannot hold").rejection()
    parsed = parse(Source(name, text))
    errors = [d for d in parsed.diagnostics if d.severity == "error"]
    if errors:
        raise Reject(*errors)
    for i, (original, read) in enumerate(zip(file.statements, parsed.file.statements, strict=False)):
        if original != read:
            raise json_form(
                f"`$.statements[{i}]` says what no recipe can",
                read.span,
                help="names are made of a-z, A-Z, 0-9, `_` and dots; digits and unit are apart",
            ).rejection()
    if parsed.file != file:
        raise json_form("the recipe says what no recipe can", None).rejection()
    return parsed.file


# Out


def _node_or_plain_value_to_json(node: Any, with_spans: bool) -> Any:
    if isinstance(node, tuple):
        return [_node_or_plain_value_to_json(part, with_spans) for part in node]
    if type(node).__name__ not in NODES:
        return node
    if not with_spans and isinstance(node, ast.Text | ast.Bool):
        return node.value
    if not with_spans and isinstance(node, ast.Items):
        return [_node_or_plain_value_to_json(item, with_spans) for item in node.items]
    fields = {"node": type(node).__name__}
    for field, kind in _field_names_and_types(NODES[type(node).__name__]):
        value = getattr(node, field)
        fields[field] = (
            value.path
            if isinstance(value, ast.Name) and _allows_only_name(kind)
            else _node_or_plain_value_to_json(value, with_spans)
        )
    return fields | ({"span": [node.span.start, node.span.end]} if with_spans else {})


@cache
def _field_names_and_types(node: type) -> list[tuple[str, Any]]:
    hints = get_type_hints(node)
    return [(f.name, hints[f.name]) for f in fields(node) if f.name not in ("span", "name_span")]


@cache
def _default_by_field(node: type) -> dict[str, Any]:
    return {f.name: f.default for f in fields(node) if f.default is not MISSING}


def _allows_only_name(type_hint: Any) -> bool:
    return ast.Name in _allowed_types(type_hint) and not set(_allowed_types(type_hint)) - {ast.Name, type(None)}


def _allowed_types(type_hint: Any) -> tuple:
    """The types that a hint allows."""
    if get_origin(type_hint) is Union or type(type_hint).__name__ == "UnionType":
        return tuple(c for part in get_args(type_hint) for c in _allowed_types(part))
    return (type_hint,)


# In


class _Reading:
    """Makes nodes of JSON; `path` is where in it, as `$.statements[0].call`."""

    def __init__(self, nowhere: Span):
        self.nowhere = nowhere
        self.depth = 0

    def read_node_within_depth(self, data: Any, kind: Any, path: str) -> Any:
        """Parse `data` as the type hint `kind` of a field."""
        if self.depth > 400:
            raise json_form(f"`{path[:60]}…` is nested too deep").rejection()
        self.depth += 1
        node = self._read_node(data, kind, path)
        self.depth -= 1
        return node

    def _read_node(self, data: Any, kind: Any, path: str) -> Any:
        allowed = _allowed_types(kind)
        if get_origin(kind) is tuple:
            if not isinstance(data, list):
                raise _type_error(path, "a list", data).rejection()
            return tuple(
                self.read_node_within_depth(part, get_args(kind)[0], f"{path}[{i}]") for i, part in enumerate(data)
            )
        if data is None and type(None) in allowed:
            return None
        if isinstance(data, dict):
            return self._read_node_object(data, allowed, path)
        plain = self._try_scalar_or_list_node(data, allowed, path)
        if plain is None:
            raise _type_error(path, _required_kind_text(allowed), data).rejection()
        return plain

    def _try_scalar_or_list_node(self, data: Any, allowed_types: tuple, path: str) -> Any:
        """A string, boolean, number or list, or None where it does not fit."""
        if isinstance(data, bool):
            return (
                data
                if bool in allowed_types
                else ast.Bool(data, span=self.nowhere)
                if ast.Bool in allowed_types
                else None
            )
        if isinstance(data, str):
            if str in allowed_types:
                return data
            if ast.Text in allowed_types:
                return ast.Text(data, span=self.nowhere)
            return self._parse_name_node(data, path) if ast.Name in allowed_types else None
        if isinstance(data, int | float) and ast.Number in allowed_types:
            return ast.Number(repr(data), span=self.nowhere)
        if isinstance(data, list) and ast.Items in allowed_types:
            items = tuple(self.read_node_within_depth(part, ast.Expr, f"{path}[{i}]") for i, part in enumerate(data))
            return ast.Items(items, span=self.nowhere)
        return None

    def _parse_name_node(self, data: str, path: str) -> ast.Name:
        if not _name.fullmatch(data):
            raise json_form(f"`{path}` is no name", help="names are made of a-z, A-Z, 0-9, `_` and dots").rejection()
        return ast.Name(data, span=self.nowhere)

    def _read_node_object(self, data: dict, allowed_types: tuple, path: str) -> Any:
        node = NODES.get(data.get("node")) if isinstance(data.get("node"), str) else None
        if node is None and len(allowed_types) == 1 and allowed_types[0] in NODES.values() and "node" not in data:
            node = allowed_types[0]
        if node is None or node not in allowed_types:
            raise _type_error(path, _required_kind_text(allowed_types), data).rejection()
        known = dict(_field_names_and_types(node))
        unknown = set(data) - set(known) - {"node", "span", "name_span"}
        if unknown:
            raise json_form(
                f"`{path}` has no part `{min(unknown)}`", help="its parts are " + ", ".join(known)
            ).rejection()
        missing = [
            name
            for name in known
            if name not in data
            and name not in _default_by_field(node)
            and type(None) not in _allowed_types(known[name])
        ]
        if missing:
            raise json_form(f"`{path}` lacks `{missing[0]}`", help="its parts are " + ", ".join(known)).rejection()
        parts = {
            name: self.read_node_within_depth(data.get(name), kind, f"{path}.{name}")
            for name, kind in known.items()
            if name in data or name not in _default_by_field(node)
        }
        return self._parse_name_node(parts["path"], path) if node is ast.Name else node(**parts, span=self.nowhere)


def _required_kind_text(allowed_types: tuple) -> str:
    names = [
        {str: "a string", bool: "true or false", int: "a number"}.get(c)
        or (f"a {c.__name__}" if c in NODES.values() else "")
        for c in allowed_types
        if c is not type(None)
    ]
    names = [n for n in names if n]
    if len(names) < 4:
        return " or ".join(names)
    return "a statement" if set(allowed_types) == set(get_args(ast.Statement)) else "a value"


def _type_error(path: str, expected: str, data: Any) -> Diagnostic:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "nothing"}
    actual = kinds.get(type(data), "a number")
    if isinstance(data, dict) and isinstance(data.get("node"), str):
        actual = f"a node `{data['node'][:40]}`"
    return json_form(f"`{path}` is {actual}, where {expected} is expected")

"""A word's declaration read from its source, never importing the file: `check` pays for no torch.

The header of a file on a shelf is its class's docstring, class-level literals and `param(...)` fields. What
is read here equals what an import would give (tests/dsl/test_header.py), which is why a header has to be
literal: numbers, strings, tuples, dicts, the values of dsl/checker/values.py, `Close` and `Lossy`. What several words
share may stand in a class between them and their kind, which they import relatively: it is read the same way.
"""

import ast
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from ...dsl.checker import values
from ...dsl.checker.vocabulary import REQUIRED, Param, Word
from . import interfaces, target

BASES = {
    "pass": interfaces.Pass,
    "target": target.Target,
    "metric": interfaces.Metric,
    "data": interfaces.Data,
    "model": interfaces.Source,
}
MAKERS = {
    c.__name__: c
    for c in (
        values.Ratio,
        values.Bytes,
        values.Duration,
        values.Range,
        values.Selector,
        values.Shares,
        values.DataRef,
        values.ModelRef,
        values.ProfileRef,
        values.StepRef,
        values.MetricRef,
        interfaces.Close,
        interfaces.Lossy,
    )
}
TYPES = {
    "int": "int",
    "float": "float",
    "str": "string",
    "bool": "bool",
    "Ratio": "ratio",
    "Bytes": "bytes",
    "Duration": "duration",
    "Selector": "selector",
    "Range": "range",
    "Shares": "shares",
    "Data": "data",
    "DataRef": "data",
    "MetricRef": "metric",
    "ModelRef": "model",
    "ProfileRef": "profile",
    "StepRef": "step",
}


def read_header(kind: str, name: str, path: Path) -> Word:
    """The declaration of the one class of a file, and of classes of effc between it and its kind."""
    base, tree = BASES[kind], ast.parse(path.read_text(encoding="utf-8"))
    lines = [
        line for node in tree.body if isinstance(node, ast.ClassDef) and (line := _class_chain(node, tree, path, base))
    ]
    assert len(lines) == 1, f"{path}: {len(lines)} classes derive from {base.__name__}, a word is one"
    (line,) = lines
    class_def, _ = line[-1]
    doc = ast.get_docstring(class_def)
    assert doc, f"{path}:{class_def.lineno}: the class {class_def.name} has no docstring"
    params, facts = inherited_declarations(base)
    for node, file in line:
        _add_declarations(node, file, params, facts)
    shared = {p.name for p in inherited_declarations(base)[0].values()}
    return Word(kind, name, doc, _display_order(params, [shared, *map(_named, line[:-1])]), facts, str(path))


def _display_order(params: dict[str, Param], above: list[set[str]]) -> tuple[Param, ...]:
    """As a page shows them: what must be given, then the word's own, then what it shares with others.

    above   names of parameters that each class above the word declares, the kind's first
    """
    depth = {name: len(above) - level for level, names in enumerate(above) for name in names}
    return tuple(sorted(params.values(), key=lambda p: (p.default is not REQUIRED, depth.get(p.name, 0))))


def _named(line: tuple[ast.ClassDef, Path]) -> set[str]:
    """Parameters that a class of a line declares."""
    return {s.target.id for s in line[0].body if isinstance(s, ast.AnnAssign) and _is_param(s.value)}


def _class_chain(node: ast.ClassDef, tree: ast.Module, path: Path, base: type) -> list[tuple[ast.ClassDef, Path]]:
    """The classes below `base` down to `node`, each with its file; none where `node` does not derive from it.

    A base of the same file or of one that a relative import leads to is read there: what several words share.
    """
    names = [b.id for b in node.bases if isinstance(b, ast.Name) and b.id != node.name]
    if base.__name__ in names:
        return [(node, path)]
    for name in names:
        file = _source_file_of_class(name, tree, path)
        above = ast.parse(file.read_text(encoding="utf-8")) if file else ast.Module([], [])
        for parent in above.body:
            if isinstance(parent, ast.ClassDef) and parent.name == name and file:
                line = _class_chain(parent, above, file, base)
                return [*line, (node, path)] if line else []
    return []


def _source_file_of_class(name: str, tree: ast.Module, path: Path) -> Path | None:
    """The file in which a class of that name is written: this one, or the one that a relative import leads to."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return path
        if isinstance(node, ast.ImportFrom) and node.level and node.module and name in (n.name for n in node.names):
            file = path.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")
            return file if file.is_file() else None
    return None


def _add_declarations(node: ast.ClassDef, path: Path, params: dict[str, Param], facts: dict[str, Any]) -> None:
    """Add what a class declares; a parameter declared again keeps its place."""
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and _is_param(statement.value):
            params[statement.target.id] = _parse_param(statement, path)
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            facts[statement.target.id] = _literal_value(statement.value, path)
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            facts[statement.targets[0].id] = _literal_value(statement.value, path)


def inherited_declarations(base: type) -> tuple[dict[str, Param], dict[str, Any]]:
    """Parameters and facts that a kind gives to all of its words."""
    facts: dict[str, Any] = {}
    for cls in reversed(base.__mro__):
        if issubclass(cls, interfaces.Plugin):
            facts |= {k: v for k, v in vars(cls).items() if _annotated_as_fact(cls, k)}
    return {f.name: from_field(f, (TYPES[f.type.__name__],)) for f in fields(base)}, facts


def _annotated_as_fact(cls: type, name: str) -> bool:
    return "ClassVar" in str(vars(cls).get("__annotations__", {}).get(name, ""))


def from_field(field: Field, types: tuple[str, ...], choices: tuple[str, ...] = ()) -> Param:
    """A `Param` from a dataclass field; one without a default must be given."""
    default = REQUIRED if field.default is MISSING else field.default
    return Param(field.name, types, default=default, choices=choices, **field.metadata)


def _is_param(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "param"


def _parse_param(statement: ast.AnnAssign, path: Path) -> Param:
    call, name = statement.value, statement.target.id
    types, choices, optional = parse_annotation(statement.annotation, path)
    fields = {k.arg: _literal_value(k.value, path) for k in call.keywords}
    assert len(call.args) == 1, f"{path}:{call.lineno}: `{name}` has one sentence, then keywords"
    default = fields.pop("default", REQUIRED)
    assert not optional or default is None, f"{path}:{call.lineno}: `{name}` may be None, so None is its default"
    assert optional or default is not None, f"{path}:{call.lineno}: the default of `{name}` is None, its type has none"
    declared = Param(name, types, _literal_value(call.args[0], path), default, choices=choices, **fields)
    assert "shares" not in types or declared.of, (
        f"{path}:{call.lineno}: `{name}` divides among its `of`, which it lacks"
    )
    return declared


def parse_annotation(node: ast.expr, path: Path) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """Types, choices and whether None is allowed, of an annotation such as `int | Ratio | None`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        left, right = parse_annotation(node.left, path), parse_annotation(node.right, path)
        return left[0] + right[0], left[1] + right[1], left[2] or right[2]
    if isinstance(node, ast.Constant) and node.value is None:
        return (), (), True
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return parse_annotation(ast.parse(node.value, mode="eval").body, path)
    if isinstance(node, ast.Name) and node.id in TYPES:
        return (TYPES[node.id],), (), False
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id == "Literal":
            return ("choice",), tuple(e.value for e in inner), False
        if node.value.id in ("list", "tuple"):
            types, choices, _ = parse_annotation(inner[0], path)
            return tuple(f"list[{t}]" for t in types), choices, False
    raise AssertionError(f"{path}:{node.lineno}: `{ast.unparse(node)}` is no type that a recipe can write")


def _literal_value(node: ast.expr, path: Path) -> Any:
    """The value of a literal expression; an AssertionError names the line of any other."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in MAKERS:
        args = [_literal_value(a, path) for a in node.args]
        return MAKERS[node.func.id](*args, **{k.arg: _literal_value(k.value, path) for k in node.keywords})
    if isinstance(node, (ast.Tuple, ast.List)):
        items = [_literal_value(e, path) for e in node.elts]
        return tuple(items) if isinstance(node, ast.Tuple) else items
    if isinstance(node, ast.Dict):
        return {_literal_value(k, path): _literal_value(v, path) for k, v in zip(node.keys, node.values, strict=True)}
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise AssertionError(
            f"{path}:{node.lineno}: `{ast.unparse(node)}` is not literal; a header is read, not run"
        ) from None

"""A word's declaration from its source, without importing the file: `check` pays for no torch.

The header of a file on a shelf is its class's docstring, class-level literals, `param(...)` fields and the methods of
`dsl/checker/rules.py`. A class of these alone is made here; a test holds that it equals the imported one
(tests/dsl/test_header.py). Reading one runs no code of the file: values are numbers, strings, tuples, dicts, values of
dsl/checker/values.py, `Close` and `Lossy`. Its rules run where a recipe names the word. What several words share may
stand in a class between them and their kind, or in a name for a `Literal[...]`, which they import relatively.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import FunctionType
from typing import Any

from ...dsl.checker import rules, values
from ...dsl.checker.vocabulary import REQUIRED, Param, Word
from . import interfaces, target
from .plugin_packages import invalid_plugin

BASES: dict[str, type] = {
    "pass": interfaces.Pass,
    "target": target.Target,
    "metric": interfaces.Metric,
    "data": interfaces.Data,
    "model": interfaces.Source,
}
_VALUES = [value for value in vars(values).values() if isinstance(value, type) and value.__module__ == values.__name__]
# classes that annotate parameters, and the names of their types in pages
TYPES = {c.__name__: c.__name__.removesuffix("Ref").lower() for c in (int, float, bool, *_VALUES)} | {"str": "string"}
RULES = {name for name, value in vars(rules.Rules).items() if isinstance(value, FunctionType)}
PROBLEMS = (rules.Conflict, rules.Unread, rules.MissingStep)
# what headers may name
NAMES: dict[str, Any] = {c.__name__: c for c in (*_VALUES, *PROBLEMS, interfaces.Close, interfaces.Lossy)}
NAMES["param"] = interfaces.param
_LITERAL = (ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.UnaryOp, ast.USub, ast.Call, ast.keyword, ast.Load)
# class-level values of version 0.1, and the method that says the same
_REPLACED = dict.fromkeys(("conflicts", "only", "needs"), "problems")

Chain = list[tuple[ast.ClassDef, Path]]
Types = tuple[tuple[str, ...], tuple[str, ...], bool]  # of a parameter, its choices, and whether it may be None


def read_plugin_header(kind: str, name: str, source_path: Path, package: str = "effc") -> Word:
    """The declaration of the one class of a file, and of classes of its package between it and its kind."""
    base, tree = BASES[kind], ast.parse(source_path.read_text(encoding="utf-8"))
    chains = [
        chain
        for node in tree.body
        if isinstance(node, ast.ClassDef) and (chain := _inheritance_chain_below_base(node, tree, source_path, base))
    ]
    assert len(chains) == 1, f"{source_path}: {len(chains)} classes derive from {base.__name__}, a word is one"
    (chain,) = chains
    node, _ = chain[-1]
    doc = ast.get_docstring(node)
    assert doc, f"{source_path}:{node.lineno}: the class {node.name} has no docstring"
    cls: type = base
    types: dict[str, Types] = {f.name: ((TYPES[f.type.__name__],), (), False) for f in fields(base)}
    depth = dict.fromkeys(types, len(chain))
    for level, (node, file) in enumerate(chain):
        cls, declared = _define_header_class(node, file, cls)
        types |= declared
        depth = dict.fromkeys(declared, len(chain) - 1 - level) | depth
    params = sorted(
        (_param_of_field(f, types[f.name], source_path) for f in fields(cls)),
        key=lambda p: (not p.required, depth[p.name]),
    )
    problems = tuple(problem for node, file in chain for problem in _declared_problems(node, file))
    declare = cls if package == "effc" else _reject_on_rule_errors(cls, f"{kind} `{name}`", source_path)
    return Word(kind, name, doc, tuple(params), _declared_class_values(cls), str(source_path), problems, declare)


def _inheritance_chain_below_base(node: ast.ClassDef, tree: ast.Module, path: Path, base: type) -> Chain:
    """The classes below `base` down to `node`, each with its file; none where `node` does not derive from it.

    A base of the same file or of one that a relative import leads to is read there: what several words share.
    """
    names = [b.id for b in node.bases if isinstance(b, ast.Name) and b.id != node.name]
    if base.__name__ in names:
        return [(node, path)]
    for name in names:
        file = _file_that_defines(name, tree, path)
        above = ast.parse(file.read_text(encoding="utf-8")) if file else ast.Module([], [])
        for parent in above.body:
            if isinstance(parent, ast.ClassDef) and parent.name == name and file:
                line = _inheritance_chain_below_base(parent, above, file, base)
                return [*line, (node, path)] if line else []
    return []


def _file_that_defines(name: str, tree: ast.Module, path: Path) -> Path | None:
    """The file in which a class or a value of that name is written: this one, or the one that a relative import leads
    to."""
    for node in tree.body:
        if (isinstance(node, ast.ClassDef) and node.name == name) or _value_assigned_to(node, name):
            return path
        if isinstance(node, ast.ImportFrom) and node.level and node.module and name in (n.name for n in node.names):
            file = path.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")
            return file if file.is_file() else None
    return None


def _value_assigned_to(node: ast.stmt, name: str) -> ast.expr | None:
    """Value of `NAME = ...` at the top of a file."""
    match node:
        case ast.Assign([ast.Name(target)], value) if target == name:
            return value
    return None


def _define_header_class(node: ast.ClassDef, path: Path, base: type) -> tuple[type, dict[str, Types]]:
    """Class of a header alone, below another, and the types of the parameters that it declares."""
    body: list[ast.stmt] = [ast.Expr(ast.Constant(ast.get_docstring(node) or node.name))]
    declared: dict[str, Types] = {}
    for statement in node.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(name), value=ast.Call(func=ast.Name("param")) as value):
                declared[name] = _types_and_choices_of_annotation(statement.annotation, path)
                _assert_is_literal(value, path)
                body.append(ast.AnnAssign(statement.target, ast.Constant("Any"), value, 1))
            case ast.AnnAssign(target=ast.Name(name), value=ast.expr() as value) | ast.Assign([ast.Name(name)], value):
                _assert_is_literal(value, path)
                assert name not in _REPLACED and name not in RULES, (
                    f"{path}:{statement.lineno}: `{name}` is a method now: `{_REPLACED.get(name, name)}`"
                )
                body.append(ast.Assign([ast.Name(name, ast.Store())], value))
            case ast.FunctionDef(name) if name in RULES or name.endswith("_problems"):
                alone = ast.unparse(statement.args) == "self" and not statement.decorator_list
                assert alone, f"{path}:{statement.lineno}: `{name}` has `self` alone, and no decorator"
                statement.returns = None
                body.append(statement)
    header = ast.ClassDef(node.name, [ast.Name(base.__name__, ast.Load())], [], body, [])
    names = NAMES | {"__name__": __name__, base.__name__: base}
    exec(compile(ast.fix_missing_locations(ast.Module([header], [])), str(path), "exec"), names)
    names[node.name].__abstractmethods__ = frozenset()
    return names[node.name], declared


def _assert_is_literal(value: ast.expr, path: Path) -> None:
    """Assert that an expression is made of literals and of calls of what headers may name."""
    for node in ast.walk(value):
        literal = isinstance(node, _LITERAL) or (isinstance(node, ast.Name) and node.id in NAMES)
        assert literal, f"{path}:{value.lineno}: `{ast.unparse(value)}` is not literal; a header is read, not run"


def _param_of_field(field: Field, types: Types, path: Path) -> Param:
    """A `Param` from a dataclass field; one without a default must be given."""
    (kinds, choices, optional), name = types, f"{path}: `{field.name}`"
    default = REQUIRED if field.default is MISSING else field.default
    declared = Param(field.name, kinds, default=default, choices=choices, **field.metadata)
    assert not optional or default is None, f"{name} may be None, so None is its default"
    assert optional or default is not None, f"{name} has the default None, which its type lacks"
    assert "shares" not in kinds or declared.of, f"{name} divides among its `of`, which it lacks"
    return declared


def _declared_class_values(cls: type) -> dict[str, Any]:
    """Class-level values of a word that are no parameters, with those of its kind."""
    params, methods = {f.name for f in fields(cls)}, (FunctionType, classmethod, staticmethod, property)
    plugins = [c for c in reversed(cls.__mro__) if issubclass(c, interfaces.Plugin)]
    public = {n: v for c in plugins for n, v in vars(c).items() if not n.startswith("_") and n not in params}
    return {name: value for name, value in public.items() if not isinstance(value, methods)}


def _declared_problems(node: ast.ClassDef, path: Path) -> Iterator[rules.Problem]:
    """Problems that the rules of a class can report; their sentences are literals."""
    names, calls = {c.__name__: c for c in PROBLEMS}, (n for n in ast.walk(node) if isinstance(n, ast.Call))
    for call in sorted(calls, key=lambda call: call.lineno):
        if isinstance(call.func, ast.Name) and call.func.id in names:
            for argument in call.args:
                _assert_is_literal(argument, path)
            yield names[call.func.id](*map(ast.literal_eval, call.args))


def _reject_on_rule_errors(cls: type, word: str, path: Path) -> Callable[..., rules.Rules]:
    """A header's class whose rules raise Reject (bad-plugin) where they fail: whatever the code of a package raises."""

    def rejecting(rule: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run(self: Any) -> Any:
            try:
                answer = rule(self)
                return list(answer) if isinstance(answer, Iterator) else answer
            except Exception as error:
                message = f"`{rule.__name__}` of the {word} fails: {type(error).__name__}: {error}"
                help_text = f"{path.name} has it; install another version of its package"
                raise invalid_plugin(message, help=help_text).rejection() from error

        return run

    for name in RULES:
        setattr(cls, name, rejecting(getattr(cls, name)))
    return cls


def _types_and_choices_of_annotation(node: ast.expr, path: Path) -> Types:
    """Types, choices and whether None is allowed, of an annotation such as `int | Ratio | None`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        left, right = (
            _types_and_choices_of_annotation(node.left, path),
            _types_and_choices_of_annotation(node.right, path),
        )
        return tuple(dict.fromkeys(left[0] + right[0])), left[1] + right[1], left[2] or right[2]
    if isinstance(node, ast.Constant) and node.value is None:
        return (), (), True
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _types_and_choices_of_annotation(ast.parse(node.value, mode="eval").body, path)
    if isinstance(node, ast.Name) and node.id in TYPES:
        return (TYPES[node.id],), (), False
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id == "Literal":
            return ("choice",), tuple(map(ast.literal_eval, inner)), False
        if node.value.id in ("list", "tuple"):
            types, choices, _ = _types_and_choices_of_annotation(inner[0], path)
            return tuple(f"list[{t}]" for t in types), choices, False
    if isinstance(node, ast.Name) and (alias := _alias_of_annotation(node.id, path)):
        return _types_and_choices_of_annotation(*alias)
    raise AssertionError(f"{path}:{node.lineno}: `{ast.unparse(node)}` is no type that a recipe can write")


def _alias_of_annotation(name: str, path: Path) -> tuple[ast.expr, Path] | None:
    """Annotation that a name for a type stands for, and the file that it is in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    file = _file_that_defines(name, tree, path)
    body = ast.parse(file.read_text(encoding="utf-8")).body if file else []
    return next(((value, file) for node in body if file and (value := _value_assigned_to(node, name))), None)

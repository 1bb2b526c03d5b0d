"""Tests and benchmarks name what modules have, and arguments that functions take; heavy ones too, which nobody runs for
days.

mypy reads the packages and bench/; tests have too many stand-ins for it.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from tests.test_layout import ROOT, shown, tree

SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
CODE = re.compile(r"from (effc[\w.]+) import ((?:\w+(?: as \w+)?,? ?)+)")  # of a process of its own
OF_ANY_MODULE = {"__file__", "__name__", "__doc__", "__dict__", "__path__", "__getattr__", "__spec__"}


@cache
def module_file(name: str) -> Path | None:
    """File of a module of effc, tests or bench."""
    parts = name.split(".")
    path = ROOT.joinpath(*(parts[1:] if parts[0] == "effc" else parts))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return (
        next((file for file in candidates if file.is_file()), None) if parts[0] in ("effc", "tests", "bench") else None
    )


def bindings(node: ast.AST) -> Iterator[str]:
    """Names that a module's own statements bind, those within `if`, `try`, `for` and `with` included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, SCOPES):
            yield getattr(child, "name", "")
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in child.names)
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        else:
            yield from bindings(child)


@cache
def names_of(file: Path) -> frozenset[str]:
    declared = {name for node in ast.walk(tree(file)) if isinstance(node, ast.Global) for name in node.names}
    return frozenset({*bindings(tree(file)), *declared} | OF_ANY_MODULE)


def imported_modules(nodes: Sequence[ast.AST]) -> dict[str, str]:
    """Local name -> module of ours, of names that stand for nothing else in the file."""
    modules = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom) and not node.level
        for alias in node.names
        if module_file(f"{node.module}.{alias.name}")
    }
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}
    return {name: module for name, module in modules.items() if name not in stored | arguments}


def references(nodes: Sequence[ast.AST]) -> Iterator[tuple[ast.expr | ast.stmt, str, str]]:
    """(node, module, name) of what is imported, by code in strings too, is an attribute, or is patched."""
    modules = imported_modules(nodes)
    for node in nodes:
        match node:
            case ast.ImportFrom(level=0, module=module, names=names):
                yield from ((node, module, alias.name) for alias in names)
            case ast.Attribute(value=ast.Name(id=local), attr=name) if local in modules:
                yield node, modules[local], name
            case ast.Call(func=ast.Attribute(attr="setattr"), args=[ast.Name(id=local), ast.Constant(value=name), *_]):
                if local in modules:
                    yield node, modules[local], name
            case ast.Constant(value=str(text)):
                for module, names in CODE.findall(text):
                    yield from ((node, module, name.split()[0]) for name in names.split(",") if name.strip())


def missing(file: Path) -> Iterator[str]:
    for node, module, name in references(list(ast.walk(tree(file)))):
        source = module_file(module)
        if source and name not in names_of(source) and not module_file(f"{module}.{name}"):
            yield f"{shown(file)}:{node.lineno}: {module}.{name}"


FILES = [file for folder in ("tests", "bench") for file in sorted((ROOT / folder).rglob("*.py"))]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
WITHOUT_ARGUMENTS = {"ABC", "NamedTuple", "Protocol", "object"}  # bases that take none of their own


@cache
def definitions(file: Path) -> dict[str, Definition]:
    return {node.name: node for node in tree(file).body if isinstance(node, Definition)}


@cache
def imported_definitions(file: Path) -> dict[str, tuple[Path, Definition]]:
    """Local name -> a function or class of ours and its file, of names that the file imports and binds to nothing else."""
    nodes = list(ast.walk(tree(file)))
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    stored |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    stored |= {node.name for node in nodes if isinstance(node, Definition)}
    imports = [(absolute(file, node), node.names) for node in nodes if isinstance(node, ast.ImportFrom)]
    return {
        alias.asname or alias.name: (source, definitions(source)[alias.name])
        for module, names in imports
        if (source := module_file(module)) is not None
        for alias in names
        if alias.name in definitions(source) and (alias.asname or alias.name) not in stored
    }


def absolute(file: Path, node: ast.ImportFrom) -> str:
    """Module that an import reads, also a relative one."""
    folders = file.relative_to(ROOT).parent.parts
    above = folders[: len(folders) - node.level + 1]
    return ".".join(["effc", *above, *filter(None, [node.module])]) if node.level else node.module or ""


def accepted_keywords(file: Path, definition: Definition) -> set[str] | None:
    """Arguments that a function or class takes by keyword; None where they are not known."""
    if not isinstance(definition, ast.ClassDef):
        arguments = definition.args
        return None if arguments.kwarg else {a.arg for a in (*arguments.args, *arguments.kwonlyargs)}
    for method in definition.body:
        if isinstance(method, ast.FunctionDef) and method.name in ("__init__", "__new__"):
            return accepted_keywords(file, method)
    fields = {n.target.id for n in definition.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    known = imported_definitions(file) | {name: (file, node) for name, node in definitions(file).items()}
    for base in definition.bases:
        name = ast.unparse(base).partition("[")[0]
        if name in WITHOUT_ARGUMENTS:
            continue
        inherited = accepted_keywords(*known[name]) if name in known else None
        if inherited is None:
            return None
        fields |= inherited
    return None if definition.keywords else fields


def unknown_keywords(file: Path) -> Iterator[str]:
    known = imported_definitions(file)
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            accepted = accepted_keywords(*known[node.func.id])
            for keyword in node.keywords:
                if accepted is not None and keyword.arg is not None and keyword.arg not in accepted:
                    yield f"{shown(file)}:{node.lineno}: {node.func.id}({keyword.arg}=)"


def test_tests_and_benchmarks_name_what_modules_have():
    assert [line for file in FILES for line in missing(file)] == []


def test_tests_and_benchmarks_name_arguments_that_functions_take():
    assert [line for file in FILES for line in unknown_keywords(file)] == []


def test_a_name_that_a_module_has_no_more_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_references.shown", str)
    file = tmp_path / "test_it.py"
    file.write_text(
        "from bench import loads\nfrom bench.serve import gone\nloads.measure()\nloads.p95([])\n"
        f"CODE = 'from effc.kernels.ops import {'KERNELS, lost'}'\npatch.setattr(loads, 'old', 0)\n"
    )
    names = {"bench.serve.gone", "bench.loads.measure", "effc.kernels.ops.lost", "bench.loads.old"}
    assert {line.rpartition(": ")[2] for line in missing(file)} == names


def test_an_argument_that_a_function_or_class_takes_no_more_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_references.shown", str)
    monkeypatch.setattr("tests.test_references.ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "shapes.py").write_text(
        "class Box:\n    width: int\nclass Crate(Box):\n    lid: str = ''\ndef area(side, *, scale=1): ...\n"
    )
    file = tmp_path / "bench" / "uses.py"
    file.write_text(
        "from bench.shapes import Crate, area\nCrate(width=1, lid='x', depth=2)\narea(1, scale=2, unit='m')\n"
    )
    module_file.cache_clear()
    assert [line.rpartition(": ")[2] for line in unknown_keywords(file)] == ["Crate(depth=)", "area(unit=)"]
    module_file.cache_clear()

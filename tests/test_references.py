"""Tests and benchmarks name what modules have, heavy ones too, which nobody runs for days.

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


def test_tests_and_benchmarks_name_what_modules_have():
    files = [file for folder in ("tests", "bench") for file in sorted((ROOT / folder).rglob("*.py"))]
    assert [line for file in files for line in missing(file)] == []


def test_a_name_that_a_module_has_no_more_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_references.shown", str)
    file = tmp_path / "test_it.py"
    file.write_text(
        "from bench import loads\nfrom bench.serve import gone\nloads.measure()\nloads.p95([])\n"
        f"CODE = 'from effc.kernels.ops import {'KERNELS, lost'}'\npatch.setattr(loads, 'old', 0)\n"
    )
    names = {"bench.serve.gone", "bench.loads.measure", "effc.kernels.ops.lost", "bench.loads.old"}
    assert {line.rpartition(": ")[2] for line in missing(file)} == names

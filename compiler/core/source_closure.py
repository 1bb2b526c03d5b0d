"""The source that a word's behaviour depends on: its file and all of effc that it imports, as one hash."""

import ast
import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path


@cache
def effc_import_closure(path: Path) -> tuple[Path, ...]:
    """`path` and every file of effc that it imports when it runs, directly or not, sorted.

    Only relative imports count, which is how effc's files name each other, and names that packages of plug-ins import
    from `effc.plugin`. Imports inside functions count, those under `TYPE_CHECKING` don't: nothing that runs reads them.
    """
    reached: set[Path] = set()
    waiting = [path.resolve()]
    while waiting:
        file = waiting.pop()
        if file not in reached:
            reached.add(file)
            waiting += directly_imported_effc_files(file)
    return tuple(sorted(reached))


@cache
def directly_imported_effc_files(file: Path) -> tuple[Path, ...]:
    """Files of effc that one file imports when it runs."""
    candidates = []
    for node in executed_statements(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            candidates += [folder.joinpath(alias.name).with_suffix(".py") for alias in node.names]
            candidates += [folder.with_suffix(".py"), folder / "__init__.py"]
        elif isinstance(node, ast.ImportFrom) and node.module == "effc.plugin":
            defined_in = _files_of_plugin_interface()
            candidates += [defined_in[alias.name] for alias in node.names if alias.name in defined_in]
    return tuple(f for f in candidates if f.is_file())


@cache
def _files_of_plugin_interface() -> Mapping[str, Path]:
    """File of effc that defines each name of `effc.plugin`."""
    root = Path(__file__).resolve().parents[2]
    installed, checkout = root / "plugin.py", root / "compiler" / "_plugin.py"
    tree = ast.parse((installed if installed.is_file() else checkout).read_text(encoding="utf-8"))
    modules = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    return {
        alias.name: root.joinpath(*str(node.module).split(".")).with_suffix(".py")
        for node in modules
        for alias in node.names
    }


def executed_statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Every statement below `tree` but those of `if TYPE_CHECKING:`; its `else` runs. No expression holds an import."""
    for node in _direct_statements(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for statement in node.orelse:
                yield statement
                yield from executed_statements(statement)
        else:
            yield node
            yield from executed_statements(node)


def _direct_statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Statements of a node's own blocks: those of `except` and `case` among them."""
    for name in ("body", "handlers", "orelse", "finalbody", "cases"):
        block = getattr(node, name, None)
        for child in block if isinstance(block, list) else ():  # the body of a lambda is an expression
            if isinstance(child, ast.stmt):
                yield child
            else:
                yield from _direct_statements(child)


@cache
def import_closure_sha256(path: Path) -> str:
    """sha256 over the names and bytes of a file's closure."""
    digest = hashlib.sha256()
    for file in effc_import_closure(path):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()

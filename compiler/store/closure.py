"""The source that a word's behaviour depends on: its file and all of effc that it imports, as one hash."""

import ast
import hashlib
from functools import cache
from pathlib import Path


@cache
def closure(path: Path) -> tuple[Path, ...]:
    """`path` and every file of effc that it imports, directly or not, sorted.

    Only relative imports count: that is how effc's files name each other. Imports under `TYPE_CHECKING` are
    followed too, which only ever adds files.
    """
    found: set[Path] = set()
    waiting = [path.resolve()]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += imported(file)
    return tuple(sorted(found))


@cache
def imported(file: Path) -> tuple[Path, ...]:
    """Files of effc that one file imports."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            found += [folder.joinpath(alias.name).with_suffix(".py") for alias in node.names]
            found += [folder.with_suffix(".py"), folder / "__init__.py"]
    return tuple(f for f in found if f.is_file())


@cache
def fingerprint(path: Path) -> str:
    """sha256 over the names and bytes of a file's closure."""
    digest = hashlib.sha256()
    for file in closure(path):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()

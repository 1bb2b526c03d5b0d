"""Files of a package name nothing outside it: every quoted text of them that would, if it is a path."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from posixpath import dirname, isabs, join, normpath

from ..syntax import ast
from ..syntax.diagnostics import Diagnostic, Fault

outside_package = Fault(
    "outside-package",
    "A recipe of a package names a path outside the package.\n\n"
    "Packages come from others. What they may read is what came with them: no absolute path, none from a home folder, "
    "and no `..` that leads out.",
)


def paths_outside_package(file: ast.File) -> list[Diagnostic]:
    """A fault for every text that leads out of the package that a file belongs to; none where it belongs to none."""
    root, folder = file.source.root, dirname(file.source.name)
    if not root:
        return []
    return [
        outside_package(
            f"`{text.value}` leads out of the package",
            text.span,
            help="a package holds what its recipes name, or takes it as a `param` from whoever uses it",
        )
        for text in quoted_text_nodes(file.statements)
        if _path_leaves_root(root, folder, text.value)
    ]


def _path_leaves_root(root: str, folder: str, path_text: str) -> bool:
    if isabs(path_text) or path_text.startswith("~") or "\\" in path_text or "\0" in path_text:
        return True
    return not normpath(join(folder, path_text)).startswith(f"{root}/") and ".." in path_text.split("/")


def quoted_text_nodes(node: object) -> Iterator[ast.Text]:
    """Every quoted text of a syntax tree but docstrings."""
    if isinstance(node, ast.Text):
        yield node
    elif isinstance(node, (list, tuple)):
        for item in node:
            yield from quoted_text_nodes(item)
    elif is_dataclass(node):
        for part in fields(node):
            if part.name not in ("span", "doc"):
                yield from quoted_text_nodes(getattr(node, part.name))

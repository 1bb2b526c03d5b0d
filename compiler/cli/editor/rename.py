"""Another name for what a recipe declares: here, and in the recipes that use this one."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from lsprotocol import types as lsp
from pygls import uris

from ....dsl.checker.modules import resolved_module_name
from ....dsl.syntax import ast
from ....dsl.syntax.tree_builder import RESERVED
from .hover import find_declaration_of
from .names import Occurrence, occurrence_at, occurrences
from .open_documents import OpenDocuments, Reading

FILES, FOLDERS = 500, 1000  # beside a recipe and below, in which a `use` of it is looked for


class InvalidName(Exception):
    """Why a name can't be changed so."""


def renamable_occurrence(reading: Reading, offset: int, documents: OpenDocuments) -> Occurrence | None:
    """The name at an offset, where a recipe that may be written declares it."""
    occurrence = occurrence_at(occurrences(reading.file, documents.vocabulary), offset)
    declared = find_declaration_of(occurrence, reading, documents) if occurrence else None
    if occurrence is None or declared is None or _is_shipped_recipe(declared[0].path):
        return None
    return occurrence


def rename_everywhere(reading: Reading, offset: int, new_name: str, documents: OpenDocuments) -> lsp.WorkspaceEdit:
    """Edits of all files that use the name. Raises InvalidName where it can't be changed so."""
    occurrence = renamable_occurrence(reading, offset, documents)
    declared = find_declaration_of(occurrence, reading, documents) if occurrence else None
    if occurrence is None or declared is None:
        raise InvalidName("only names that a recipe declares can be changed")
    if not re.fullmatch(r"[A-Za-z_]\w*", new_name, re.ASCII) or new_name in RESERVED:
        raise InvalidName(f"`{new_name}` can't be a name: letters, digits and _, no word of the language")
    declaring, declaration = declared
    if declaration.kind == "module" and declaration.span.source.text[declaration.span.start - 1] == ".":
        raise InvalidName("write `as` and a name behind the `use` first")
    conflicts = [o for o in occurrences(declaring.file, documents.vocabulary) if o.declares and o.name == new_name]
    if any(not o.pipeline or not declaration.pipeline or o.pipeline == declaration.pipeline for o in conflicts):
        raise InvalidName(f"`{new_name}` is declared already")
    changes = {
        uri_of(declaring.path): _rename_edits(
            declaring, (declaring.source.name, *declaration.key[1:]), new_name, documents
        )
    }
    if not declaration.pipeline and declaration.kind != "module":
        for other in readings_that_may_use(declaring.path, documents):
            for target in _module_names_of_path(other, declaring.path, documents):
                changes.setdefault(uri_of(other.path), []).extend(
                    _rename_edits(other, (target, "", declaration.name), new_name, documents)
                )
    return lsp.WorkspaceEdit({uri_of_file: edits for uri_of_file, edits in changes.items() if edits})


def _rename_edits(
    reading: Reading, key: tuple[str, str, str], name: str, documents: OpenDocuments
) -> list[lsp.TextEdit]:
    spans = [o.span for o in occurrences(reading.file, documents.vocabulary) if o.key == key]
    return [lsp.TextEdit(reading.lines.range(span), name) for span in spans]


def readings_that_may_use(module_path: Path, documents: OpenDocuments) -> Iterator[Reading]:
    """Recipes that may use a file: those that are open, and those in its folder and below."""
    candidates: list[Path] = []
    for i, (folder, subfolders, files) in enumerate(os.walk(module_path.parent)):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name != "node_modules"]
        candidates += [(Path(folder) / name).resolve() for name in files if name.endswith(".effspec")]
        if i == FOLDERS or len(candidates) >= FILES:
            break
    for other in dict.fromkeys([*documents.readings, *candidates]):
        if other != module_path and (reading := documents.parse_any_file(other)) is not None:
            yield reading


def _module_names_of_path(reading: Reading, path: Path, documents: OpenDocuments) -> Iterator[str]:
    """Names that a file gives to the module at a path."""
    uses = (s for s in reading.file.statements if isinstance(s, ast.Use))
    for name in dict.fromkeys(resolved_module_name(use.target, reading.source.name) for use in uses):
        if documents.module_path(name, reading.path) == path:
            yield name


def _is_shipped_recipe(path: Path) -> bool:
    from ...plugin.recipe_library import library_folders

    return any(path.is_relative_to(folder.resolve()) for folder in library_folders())


def uri_of(path: Path) -> str:
    return uris.from_fs_path(str(path)) or path.as_uri()

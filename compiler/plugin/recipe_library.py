"""The recipes that come with effc: whole ones to compile, and modules that a recipe takes in with `use std.name`."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from ...dsl.checker.package_paths import quoted_text_nodes
from ...dsl.syntax import ast
from ...dsl.syntax.diagnostics import Fault
from ...dsl.syntax.parse import parse, read_source
from ...dsl.syntax.write import expression_text

library_recipe = Fault(
    "library-recipe",
    "A file was to be written beside a recipe that comes with effc.\n\n"
    "`effc recipes copy NAME` writes the recipe and what it names into a folder of yours.",
    exit="usage",
)

MODULES = "std"  # the folder whose files are modules


@dataclass(frozen=True)
class LibraryFile:
    """A file of the library. `name` is what a person calls it: `std.text`, `quickstart.effspec`."""

    name: str
    path: Path

    @property
    def is_module(self) -> bool:
        return self.name.startswith(f"{MODULES}.")

    @cached_property
    def file(self) -> ast.File:
        return parse(read_source(self.path)).file

    @cached_property
    def text(self) -> str:
        return read_source(self.path).text

    @property
    def doc(self) -> str:
        """The docstring, found without parsing: `effc recipes` lists all files."""
        match = re.search(r'^"""(.*?)"""', self.text, re.S | re.M)
        return match[1].strip() if match else ""

    @property
    def sentence(self) -> str:
        """The first paragraph of the docstring, on one line."""
        return " ".join(self.doc.partition("\n\n")[0].split())


def library_folders() -> list[Path]:
    spec = find_spec("effc.recipes")
    assert spec and spec.submodule_search_locations, "the recipe library is not installed"
    return [Path(p) for p in spec.submodule_search_locations]


def library_files() -> dict[str, LibraryFile]:
    """Every file of the library by name, whole recipes first."""
    recipes = [
        LibraryFile(_recipe_name(file.relative_to(folder)), file)
        for folder in library_folders()
        for file in sorted(folder.rglob("*.effspec"))
    ]
    return {s.name: s for s in sorted(recipes, key=lambda s: (s.is_module, s.name))}


def resolve_recipe_path(path: Path) -> Path:
    """The library's file that a path names, `llm/int4-gptq`, unless there is such a file here; else the path."""
    if path.exists() or path.is_absolute() or ".." in path.parts:
        return path
    known = library_files()
    recipe = known.get(path.as_posix()) or known.get(f"{path.as_posix()}.effspec")
    return recipe.path if recipe and not recipe.is_module else path


def refuse_library_recipe(path: Path) -> None:
    """Reject (library-recipe) a recipe of the library: nothing is written beside it."""
    recipe_path = resolve_recipe_path(path)
    if recipe_path != path and any(recipe_path.is_relative_to(folder) for folder in library_folders()):
        raise library_recipe(
            f"`{path}` is a recipe of the library", help=f"make it yours: `effc recipes copy {path}`"
        ).rejection()


def recipe_and_named_files(recipe: LibraryFile) -> dict[str, Path]:
    """A recipe and the files that it names, by their paths in the library: what a copy needs to work elsewhere."""
    root = next(f for f in library_folders() if recipe.path.is_relative_to(f))
    named = [recipe.path, *(recipe.path.parent / text.value for text in quoted_text_nodes(recipe.file.statements))]
    inside = {Path(os.path.normpath(file)) for file in named if file.is_file()}
    return {f.relative_to(root).as_posix(): f for f in sorted(inside) if f.is_relative_to(root)}


def _recipe_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts) if path.parts[0] == MODULES else path.as_posix()


def library_file_page(recipe: LibraryFile) -> str:
    """Page of a file of the library for `effc explain`."""
    if not recipe.is_module:
        return f"{recipe.name}, a recipe\n\n{recipe.doc}\n\n{recipe.path}"
    blocks = [f"{recipe.name}, a module of the recipe library: `use {recipe.name}`", recipe.doc]
    blocks += [
        "\n".join(lines)
        for title in ("data", "pipelines", "params")
        if len(lines := [title.capitalize(), *_declaration_lines(recipe, title)]) > 1
    ]
    return "\n\n".join([*blocks, str(recipe.path)])


def _declaration_lines(recipe: LibraryFile, title: str) -> Iterator[str]:
    alias = recipe.name.rpartition(".")[2]
    for node in recipe.file.statements:
        match node:
            case ast.Declare("data", name, call) if title == "data":
                yield f"  {alias}.{name.path} = {expression_text(call)}"
            case ast.Pipeline(name, _, doc) if title == "pipelines":
                params = ", ".join(_params_used(node, recipe.file))
                yield f"  {alias}.{name.path}({params})"
                yield from ([f"      {' '.join(doc.value.split())}"] if doc else [])
            case ast.Param(name, type_, default, bounds, doc) if title == "params":
                within = f", {expression_text(bounds)}" if bounds else ""
                yield f"  {name.path}: {type_.path}, default {expression_text(default)}{within}"
                yield from ([f"      {doc.value}"] if doc else [])


def _params_used(pipeline: ast.Pipeline, file: ast.File) -> list[str]:
    """The params that a call of the pipeline has a use for, in the order of the file."""
    from ...dsl.checker.calls import names_in_expression

    names = {name.path for step in pipeline.steps for name in names_in_expression(step.call)}
    return [s.name.path for s in file.statements if isinstance(s, ast.Param) and s.name.path in names]

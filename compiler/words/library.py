"""The recipes that come with effc: whole ones to compile, and modules that a recipe takes in with `use std.name`."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from ...dsl import ast
from ...dsl.parse import parse, read_source
from ...dsl.write import expression

MODULES = "std"  # the folder whose files are modules


@dataclass(frozen=True)
class Shipped:
    """A file of the library. `name` is what a person calls it: `std.text`, `quickstart.effspec`."""

    name: str
    path: Path

    @property
    def is_module(self) -> bool:
        return self.name.startswith(f"{MODULES}.")

    @cached_property
    def file(self) -> ast.File:
        return parse(read_source(self.path)).file

    @property
    def doc(self) -> str:
        return self.file.doc.value.strip() if self.file.doc else ""

    @property
    def sentence(self) -> str:
        """The first paragraph of the docstring, on one line."""
        return " ".join(self.doc.partition("\n\n")[0].split())


def folders() -> list[Path]:
    spec = find_spec("effc.recipes")
    assert spec and spec.submodule_search_locations, "the recipe library is not installed"
    return [Path(p) for p in spec.submodule_search_locations]


def shipped() -> dict[str, Shipped]:
    """Every file of the library by name, whole recipes first."""
    found = [
        Shipped(_name(file.relative_to(folder)), file)
        for folder in folders()
        for file in sorted(folder.rglob("*.effspec"))
    ]
    return {s.name: s for s in sorted(found, key=lambda s: (s.is_module, s.name))}


def _name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts) if path.parts[0] == MODULES else path.as_posix()


def page(recipe: Shipped) -> str:
    """What `effc explain` prints of a file of the library."""
    if not recipe.is_module:
        return f"{recipe.name}, a recipe\n\n{recipe.doc}\n\n{recipe.path}"
    blocks = [f"{recipe.name}, a module of the recipe library: `use {recipe.name}`", recipe.doc]
    blocks += [
        "\n".join(lines)
        for title in ("data", "pipelines", "params")
        if len(lines := [title.capitalize(), *_lines(recipe, title)]) > 1
    ]
    return "\n\n".join([*blocks, str(recipe.path)])


def _lines(recipe: Shipped, title: str) -> Iterator[str]:
    alias = recipe.name.rpartition(".")[2]
    for node in recipe.file.statements:
        match node:
            case ast.Declare("data", name, call) if title == "data":
                yield f"  {alias}.{name.path} = {expression(call)}"
            case ast.Pipeline(name, _, doc) if title == "pipelines":
                params = ", ".join(_params_used(node, recipe.file))
                yield f"  {alias}.{name.path}({params})"
                yield from ([f"      {' '.join(doc.value.split())}"] if doc else [])
            case ast.Param(name, type_, default, bounds, doc) if title == "params":
                within = f", {expression(bounds)}" if bounds else ""
                yield f"  {name.path}: {type_.path}, default {expression(default)}{within}"
                yield from ([f"      {doc.value}"] if doc else [])


def _params_used(pipeline: ast.Pipeline, file: ast.File) -> list[str]:
    """The params that a call of the pipeline has a use for, in the order of the file."""
    from ...dsl.calls import names_in

    said = {name.path for step in pipeline.steps for name in names_in(step.call)}
    return [s.name.path for s in file.statements if isinstance(s, ast.Param) and s.name.path in said]

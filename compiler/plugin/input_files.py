"""Whether the files that a recipe names are there: `check` looks, and reads none."""

from collections.abc import Iterator
from pathlib import Path

from ...dsl.checker.recipe import Invocation, Recipe
from ...dsl.checker.vocabulary import Vocabulary
from ...dsl.syntax.diagnostics import Diagnostic, Fault
from ...dsl.syntax.source_file import other_kind

missing_file = Fault(
    "missing-file",
    "A recipe names a file or a folder that isn't there.\n\n"
    "`check` only warns: what is checked here may be compiled on another machine. `plan` and `compile` need it.",
    severity="warning",
)


def missing(recipe: Recipe, vocabulary: Vocabulary, folder: Path) -> Iterator[Diagnostic]:
    """A warning for each path in the recipe, or in a module of it, that leads nowhere."""
    for kind, call in _calls(recipe):
        beside = folder if call.folder is None else Path(call.folder)
        for name, (what, *words) in vocabulary.words(kind)[call.word].facts.get("reads", {}).items():
            value = call.args[name]
            for path in (value,) if isinstance(value, str) else value or ():
                if path and path not in words and not _is_there(beside, path, what):
                    kind = other_kind(beside / path)
                    said = f"`{path}` is {kind}, where a {what} is needed" if kind else f"there is no {what} `{path}`"
                    help_ = "" if kind else "a path is relative to the file that names it"
                    yield missing_file(said, call.where(name), help=help_)


def _calls(recipe: Recipe) -> Iterator[tuple[str, Invocation]]:
    for call in recipe.models.values():
        yield "model", call
    for call in recipe.data.values():
        yield "data", call
    for pipeline in recipe.pipelines.values():
        for step in pipeline.steps:
            yield "pass", step.call
        for emit in pipeline.emits:
            yield "target", emit.call


def _is_there(folder: Path, path: str, what: str) -> bool:
    """Whether a path leads somewhere; a glob, whether it matches."""
    place = folder / path
    try:
        if what == "folder":
            return place.is_dir()
        return place.is_file() or (any(c in path for c in "*?[") and next(folder.glob(path), None) is not None)
    except (OSError, ValueError, NotImplementedError):  # no access, a zero byte or `a**b`, an absolute pattern
        return False

"""Whether the files that a recipe names are there: `check` looks, and reads none."""

from collections.abc import Iterator
from pathlib import Path

from ...dsl.checker.recipe import Invocation, Recipe
from ...dsl.checker.vocabulary import Vocabulary
from ...dsl.syntax.diagnostics import Diagnostic, Fault
from ...dsl.syntax.source_file import irregular_kind_of_path

missing_file = Fault(
    "missing-file",
    "A recipe names a file or a folder that isn't there.\n\n"
    "`check` only warns: what is checked here may be compiled on another machine. `plan` and `compile` need it.",
    severity="warning",
)


def missing_file_warnings(recipe: Recipe, vocabulary: Vocabulary, folder: Path) -> Iterator[Diagnostic]:
    """A warning for each path in the recipe, or in a module of it, that leads nowhere."""
    for kind, call in _all_calls_with_kind(recipe):
        beside = folder if call.folder is None else Path(call.folder)
        for name, (file_kind, *words) in vocabulary.words(kind)[call.word].facts.get("reads", {}).items():
            value = call.args[name]
            for path in (value,) if isinstance(value, str) else value or ():
                if path and path not in words and not _path_exists(beside, path, file_kind):
                    kind = irregular_kind_of_path(beside / path)
                    message = (
                        f"`{path}` is {kind}, where a {file_kind} is needed"
                        if kind
                        else f"there is no {file_kind} `{path}`"
                    )
                    help_ = "" if kind else "a path is relative to the file that names it"
                    yield missing_file(message, call.argument_or_call_span(name), help=help_)


def _all_calls_with_kind(recipe: Recipe) -> Iterator[tuple[str, Invocation]]:
    for call in recipe.models.values():
        yield "model", call
    for call in recipe.data.values():
        yield "data", call
    for pipeline in recipe.pipelines.values():
        for step in pipeline.steps:
            yield "pass", step.call
        for emit in pipeline.emits:
            yield "target", emit.call


def _path_exists(folder: Path, path: str, file_kind: str) -> bool:
    """Whether a path leads somewhere; a glob, whether it matches."""
    full_path = folder / path
    try:
        if file_kind == "folder":
            return full_path.is_dir()
        return full_path.is_file() or (any(c in path for c in "*?[") and next(folder.glob(path), None) is not None)
    except (OSError, ValueError, NotImplementedError):  # no access, a zero byte or `a**b`, an absolute pattern
        return False

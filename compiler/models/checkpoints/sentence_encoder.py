"""Modules of a sentence-transformers folder."""

from pathlib import Path
from typing import Any

from ....dsl.syntax.diagnostics import Fault
from ...core.json_errors import describe_json_error
from ...core.safe_read import CONFIG, read_json

no_pooling = Fault(
    "no-pooling",
    "How states of tokens become one vector is not known.\n\n"
    "A folder of sentence-transformers says it in modules.json and 1_Pooling/config.json; `pooling` says it in a "
    "recipe.",
)

MODULES = "modules.json"


def read_sentence_modules(folder: Path) -> list[tuple[str, str]]:
    """Kind and folder of each module that modules.json names; folders beside it are none."""
    read = read_module_json(folder / MODULES)
    named = [m for m in read if isinstance(m, dict)] if isinstance(read, list) else []
    kinds = [(str(m.get("type", "")).rpartition(".")[2], str(m.get("path", ""))) for m in named]
    outside = [path for _, path in kinds if Path(path).is_absolute() or ".." in Path(path).parts]
    if outside:
        raise no_pooling(
            f"{folder / MODULES} names {outside[0]}, which is outside of it", help="correct it"
        ).rejection()
    return kinds


def module_paths(folder: Path) -> list[str]:
    """The folders of a folder of sentence-transformers that hold more modules, the transformer's own left out."""
    return [path for _, path in read_sentence_modules(folder) if path]


def read_module_json(path: Path) -> Any:
    try:
        return read_json(path, CONFIG)
    except (OSError, ValueError, RecursionError) as error:
        raise no_pooling(
            f"{path} is not JSON: {describe_json_error(error)}", help="fetch the file again"
        ).rejection() from error

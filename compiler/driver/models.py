"""A model that a person names on the command line: an artifact, a folder, `zoo:NAME`, or a recipe's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...dsl.checker.recipe import Invocation
from ...dsl.syntax.diagnostics import Diagnostic, Fault, Reject
from ..core.json_errors import first_line
from ..core.memory import MemoryWatch, memory_bound
from ..core.quantity import size_text
from ..core.resource_errors import is_out_of_memory

if TYPE_CHECKING:
    from ..core.settings import Settings
    from ..models.checkpoints.origin import Origin
    from ..plugin.context import Context

unknown_place = Fault(
    "unknown-place",
    "A path given on the command line leads to no model.\n\n"
    "A model is an artifact that `effc compile` wrote, a folder in the Hugging Face layout, `zoo:NAME`, "
    "`hf:ORG/NAME`, or a recipe.",
    exit="usage",
)

model_breaks = Fault(
    "model-breaks",
    "A model was opened, and breaks when it computes.\n\n"
    "Its files are of the right form, but what they say doesn't fit together: operations that are given other shapes "
    "than they take, for one. `--debug` shows where it broke.",
    exit="environment",
)

no_words = Fault("no-words", "A model was asked to answer and has no tokenizer beside its weights.", exit="environment")


@dataclass
class NamedModel:
    """`model` has its weights; `tokenizer` is None where there is none, and so is the `folder` of its files."""

    label: str
    model: Any
    tokenizer: Any
    folder: Path | None


@contextmanager
def model_errors_as_diagnostics(label: str) -> Iterator[None]:
    """Within it a model computes that may come from anybody: where it breaks, that is the model's mistake.

    Raises Reject (model-breaks) for what torch or Python raise; want of memory and interruptions stay what they are.
    """
    try:
        yield
    except Reject:
        raise
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, OSError):
            raise
        raise model_breaks(
            f"{label} breaks when it computes: {type(error).__name__}: {first_line(error)}",
            help="fetch it again; where this effc wrote it, report it with what --debug shows",
        ).rejection() from error


def is_artifact(path: Path) -> bool:
    """Whether a folder is what `effc compile` wrote, or a form of it, or what such a model saved again."""
    from ..artifacts.compact_config import KEY
    from ..artifacts.load import POINTS, has_marker_file, target_name_of_form
    from ..artifacts.manifest import NAME
    from ..core.safe_read import CONFIG, read_json

    if (path / NAME).is_file() or (path.parent.name == POINTS and (path.parents[1] / NAME).is_file()):
        return True
    try:
        return KEY in read_json(path / "config.json", CONFIG)
    except (OSError, ValueError, TypeError, RecursionError):
        kind = target_name_of_form(path.name)
        return kind is not None and (path.parent / NAME).is_file() and has_marker_file(path.parent, kind, path.name)


def resolve_origin(model_location: str, settings: "Settings") -> "Origin":
    """The origin of `zoo:NAME` or of a folder in the Hugging Face layout."""
    from ..plugin.context import Context
    from ..plugin.registry import Registry

    kind, colon, name = model_location.partition(":")
    if kind == "zoo" and colon:
        call = Invocation("zoo", {"name": name})
    elif kind == "hf" and colon:
        call = Invocation("hf", {"name": name, "revision": "main", "dtype": "auto"})
    elif Path(model_location).is_dir():
        call = Invocation("hf", {"name": str(Path(model_location).resolve()), "revision": "main", "dtype": "auto"})
    else:
        raise unknown_location_diagnostic(model_location).rejection()
    ctx = Context.without_recipe(settings, Path(), Registry())
    return resolve_recipe_model(call, ctx)


def resolve_recipe_model(call: Invocation, ctx: "Context") -> "Origin":
    """The origin of a model that a recipe names.

    Raises Reject (unsigned-artifact), before anything of it is read, where signatures are required, and it lies in an
    artifact without one, or in none and no lock holds what it contains.
    """
    if ctx.settings.signed_by:
        for value in call.args.values():
            if isinstance(value, str) and (call.word not in ("hf", "zoo") or value.startswith((".", "/", "~"))):
                file, colon, _ = value.rpartition(":")  # `net.py:make` names a function in a file
                for path in (value, file) if colon else (value,):
                    _refuse_unsigned_source(ctx.folder / Path(path).expanduser(), ctx.settings)
    return ctx.registry.make("model", call).resolve(ctx)


def _refuse_unsigned_source(path: Path, settings: "Settings") -> None:
    from ..artifacts.load import verify_signature_and_files
    from ..artifacts.manifest import NAME
    from ..artifacts.signature import unsigned

    path = path.resolve()
    for folder in (path, *path.parents[:3]):  # a point of a front lies three folders deep
        if (folder / NAME).is_file():
            if any(part.startswith(".") for part in path.relative_to(folder).parts):  # hidden files have no hash
                raise unsigned(
                    f"{path} is no part of the artifact that it lies in", help="name the artifact"
                ).rejection()
            verify_signature_and_files(folder, settings.signed_by)
            return
    if path.exists() and not settings.locked:  # whoever changes an artifact may take its manifest away
        raise unsigned(f"{path} lies in no artifact", help="name an artifact, or use it with --locked").rejection()


def check_model_path(location: str) -> None:
    """Reject (unknown-place) what can't lead to a model, before anybody imports torch to look closer."""
    kind, colon, _ = location.partition(":")
    if not Path(location).is_dir() and not (colon and kind in ("zoo", "hf")):
        raise unknown_location_diagnostic(location).rejection()


def unknown_location_diagnostic(location: str) -> Diagnostic:
    message = f"`{location}` is a file" if Path(location).is_file() else f"there is no `{location}`"
    return unknown_place(message, help="name an artifact, a model folder, zoo:NAME or hf:ORG/NAME")


def open_model(
    location: str,
    settings: "Settings",
    *,
    batch_invariant: bool = False,
    mapped: bool | None = None,
    needs_tokenizer: bool = False,
) -> NamedModel:
    """The model with its weights, ready to run; `batch_invariant` and `mapped` as `load` has them.

    One that `needs_tokenizer` has a tokenizer: Reject (no-words) otherwise, before an artifact's weights are read.
    """
    if settings.threads:
        import torch

        torch.set_num_threads(settings.threads)  # the native engine takes as many as torch has when it opens
    with MemoryWatch(settings.max_memory) as watch:
        opened = _open_artifact_or_source(location, settings, batch_invariant, mapped, needs_tokenizer)
    max_bytes = settings.max_memory
    if max_bytes is not None and watch.peak > max_bytes:
        message = (
            f"{size_text(watch.peak)} of memory are held to open {opened.label}, {size_text(max_bytes)} are allowed"
        )
        raise memory_bound(message, help="raise --max-memory").rejection()
    return opened


def _open_artifact_or_source(
    location: str, settings: "Settings", batch_invariant: bool, mapped: bool | None, needs_tokenizer: bool
) -> NamedModel:
    path = Path(location)
    if path.is_dir() and is_artifact(path):
        from ..artifacts.load import load, locate_checkpoint_and_artifact

        folder, _ = locate_checkpoint_and_artifact(path)
        tokenizer = _load_tokenizer_or_none(folder)
        if needs_tokenizer and tokenizer is None:
            raise _no_tokenizer_rejection(location)
        model = load(
            path, device=settings.device, batch_invariant=batch_invariant, mapped=mapped, on_event=settings.on_event
        )
        return NamedModel(location, model, tokenizer, folder)
    origin = resolve_origin(location, settings)
    tokenizer = origin.tokenizer()
    if needs_tokenizer and tokenizer is None:
        raise _no_tokenizer_rejection(origin.label)
    original = origin.load().eval().to(settings.device)
    return NamedModel(origin.label, original, tokenizer, origin.folder)


def refuse_without_tokenizer(folder: Path, label: str) -> None:
    """Reject (no-words) a folder of weights without tokenizer files."""
    from ..models.checkpoints.model_folder import tokenizer_files_if_complete

    if not tokenizer_files_if_complete(folder):
        raise _no_tokenizer_rejection(label)


def _no_tokenizer_rejection(label: str) -> Reject:
    return no_words(f"{label} has no tokenizer", help="copy the tokenizer files beside the weights").rejection()


def _load_tokenizer_or_none(folder: Path) -> Any:
    from ..artifacts.load import target_class_of_folder
    from ..models.checkpoints.model_folder import load_tokenizer, tokenizer_files_if_complete

    folder = target_class_of_folder(folder, None).words(folder)
    return load_tokenizer(folder, str(folder), False) if tokenizer_files_if_complete(folder) else None

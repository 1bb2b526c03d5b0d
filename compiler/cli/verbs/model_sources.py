"""Models that one server answers by: their places, names and adapters, as a command line has them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ....dsl.syntax.diagnostics import Fault
from ...apps.serving.adapters import ALL, no_adapter
from ...driver.models import check_model_path

model_names = Fault(
    "model-names",
    "Models of one server have names that don't tell them apart.\n\n"
    "A request picks a model by its name: that of its folder, or NAME of `NAME=MODEL`. An adapter's is MODEL:ADAPTER.",
    exit="usage",
)


no_reload = Fault(
    "no-reload",
    "A server was to open its models again while it answers, and can't.\n\n"
    "A new version of a folder appears beside the old one, so a server with `--reload` reads the folder around each "
    "model and each adapter. That must not be the home folder, or one around it: put models into a folder of their "
    "own.",
    exit="usage",
)


@dataclass(frozen=True)
class ModelSource:
    """Place of a model, and its name; `adapters` are NAME=FOLDER."""

    name: str
    location: str
    adapters: Sequence[str] = field(default=())


def parse_model_arguments(
    arguments: Sequence[str], name: str | None = None, adapters: Sequence[str] = ()
) -> list[ModelSource]:
    """Sources of `MODEL` and `NAME=MODEL`, with the adapters that `NAME=FOLDER` or `MODEL:NAME=FOLDER` give each.

    Raises Reject: unknown-place, model-names, no-adapter.
    """
    pairs = [split_model_argument(argument) for argument in arguments]
    for _, location in pairs:
        check_model_path(location)
    if name is not None and len(pairs) > 1:
        raise model_names(
            f"`--name {name:.80}` is one name for {len(pairs)} models", help="write NAME=MODEL for each"
        ).rejection()
    names = [name or label or default_model_name(location) for label, location in pairs]
    _refuse_equal_names("two models are", names)
    by_model: dict[str, list[str]] = {one: [] for one in names}
    for text in adapters:
        default = names[0] if len(names) == 1 else None
        model = max((one for one in names if text.startswith(f"{one}:")), key=len, default=default)
        if model is None:
            raise no_adapter(
                f"`--adapter {text:.80}` names none of the {len(names)} models",
                help="write --adapter MODEL:NAME=FOLDER",
            ).rejection()
        by_model[model].append(text.removeprefix(f"{model}:"))
    names_of_adapters = {f"{model}:{text.partition('=')[0]}" for model, texts in by_model.items() for text in texts}
    _refuse_equal_names("a model and an adapter are", [*names, *names_of_adapters])
    for one in names:
        if f"{one.rpartition(':')[0]}:{ALL}" in names_of_adapters:
            raise model_names(
                f"`{one:.80}` may be an adapter's name, too", help="name the model without `:`"
            ).rejection()
    return [ModelSource(one, location, by_model[one]) for one, (_, location) in zip(names, pairs, strict=True)]


def _refuse_equal_names(subject: str, names: Sequence[str]) -> None:
    if twice := next((one for one, count in Counter(names).items() if count > 1), None):
        raise model_names(f"{subject} called `{twice:.80}`", help="write NAME=MODEL for one of them").rejection()


def split_model_argument(argument: str) -> tuple[str, str]:
    """Name, "" without one, and place of `MODEL` or `NAME=MODEL`."""
    name, _, location = argument.partition("=")
    if not name or not location or Path(argument).exists():
        return "", argument
    return name, location


def refuse_reload_beside_personal_files(sources: Sequence[ModelSource]) -> None:
    """Raises Reject (no-reload) where a folder around a model, or around an adapter, is the home folder or has
    it inside."""
    from ..confinement import parent_folders_of_folder_and_link

    home = Path.home().resolve()
    adapters = [text.partition("=")[2] for source in sources for text in source.adapters]
    locations = [*(source.location for source in sources), *adapters]
    folders = [Path(location) for location in locations if location]
    for folder in filter(Path.is_dir, folders):
        if any(home.is_relative_to(around.resolve()) for around in parent_folders_of_folder_and_link(folder)):
            raise no_reload(
                f"{folder} lies beside personal files", help="move it into a folder that has models alone"
            ).rejection()


def default_model_name(location: str) -> str:
    """A model's name by the place that it was opened at."""
    from ...artifacts.load import target_name_of_form

    kind, colon, name = location.partition(":")
    if colon and kind in ("zoo", "hf"):
        return name
    path = Path(location).resolve()
    return path.parent.name if target_name_of_form(path.name) else path.name

"""`effc run` of a federation: all its clients in this process, a line for every round."""

from pathlib import Path
from typing import TYPE_CHECKING

from ....dsl.syntax.diagnostics import Reject

if TYPE_CHECKING:
    from ...apps.federation.declaration import Declaration
    from ...apps.federation.rounds import Federation
    from .flags import Shared


def is_federation(path: str) -> bool:
    """Whether a path is an artifact of the target `flower`."""
    from ...artifacts.manifest import NAME, read_manifest

    return (Path(path) / NAME).is_file() and read_manifest(Path(path)).kind == "flower"


def run_federation(path: Path, shared: "Shared") -> None:
    """Simulate, and write the states to a folder beside the artifact; killed, the next call goes on."""
    from ...apps.federation.app import PACKAGE
    from ...apps.federation.declaration import NAME, read_declaration
    from ...apps.federation.results import write_results
    from ...apps.federation.simulation import simulate
    from ...apps.federation.table import HEAD, round_line
    from ...artifacts.manifest import verify_files
    from ...core.safe_read import refuse_links
    from ...driver.models import model_errors_as_diagnostics

    path = path.resolve()  # `.` has no name, and results lie beside it by its name
    into = path.with_name(f"{path.name}-result")
    refuse_links(into)
    verify_files(path)
    declared = read_declaration(path / PACKAGE / NAME)
    data, screen = data_folder(path), shared.screen
    if screen.format != "json":
        screen.answer(HEAD)
    on_round = (lambda r: None) if screen.format == "json" else (lambda r: screen.answer(round_line(r)))
    with model_errors_as_diagnostics(str(path)):
        run = simulate(declared, path / declared.folder, data, shared.settings(), on_round)
    write_results(run.strategy.results(), run.course, declared, into, path)
    if screen.format == "json":
        return screen.answer_json("run", rounds=[r.to_json() for r in run.course.rounds], result=str(into))
    return _print_summary(run, declared, into, shared)


def data_folder(path: Path) -> Path:
    """The folder of the recipe: what its data's paths start from."""
    from ...artifacts.manifest import read_manifest
    from ...driver.judging.retest import find_recipe, recipe_lost

    manifest = read_manifest(path)
    file = find_recipe(path, manifest)
    if file is None:
        name = manifest.recipe.get("name", "its recipe")
        raise Reject(
            recipe_lost(
                f"{name}, whose folder the data of {path} lie in, is not beside it",
                help=f"copy {name} and its data beside {path.name}, or run from their folder",
            )
        )
    return file.parent


def _print_summary(run: "Federation", declared: "Declaration", into: Path, shared: "Shared") -> None:
    from ...apps.federation.noise import privacy_sentence
    from ...apps.federation.rounds import fault_lines
    from ...core.quantity import count_text, size

    for text in fault_lines(run.course.rounds):
        shared.screen.note(text)
    if declared.stream:
        from ...apps.federation.stream import forgetting_by_task

        worse = ", ".join(f"{value:+.4f}" for value in forgetting_by_task(run.course.rounds))
        shared.screen.note(f"tasks before the last, nats per token since their own rounds: {worse}")
    if declared.clip:
        shared.screen.note(privacy_sentence(run.course.rounds, declared))
    shared.screen.note(
        f"{count_text(len(run.course.rounds), 'round')}, {size(run.course.bytes)} sent; states in {into}"
    )

"""`effc run` of a federation: all its clients in this process, a line for every round."""

from pathlib import Path
from typing import TYPE_CHECKING

from ...plugin.target import RunRequest, Screen

if TYPE_CHECKING:
    from .declaration import Declaration
    from .rounds import Federation


def simulate_and_write_results(request: RunRequest) -> None:
    """Simulate, and write the states to a folder beside the artifact; killed, the next call goes on."""
    from ...artifacts.manifest import verify_files
    from ...core.safe_read import refuse_unsafe_write_folder
    from ...driver.models import model_errors_as_diagnostics
    from .app import PACKAGE
    from .declaration import NAME, read_declaration
    from .results import write_results
    from .simulation import simulate_federation
    from .table import HEAD, round_line

    path = request.artifact.resolve()  # `.` has no name, and results lie beside it by its name
    into = path.with_name(f"{path.name}-result")
    refuse_unsafe_write_folder(into)
    verify_files(path)
    declared = read_declaration(path / PACKAGE / NAME)
    data, screen = recipe_folder(path), request.screen
    if screen.format != "json":
        screen.answer(HEAD)
    on_round = (lambda r: None) if screen.format == "json" else (lambda r: screen.answer(round_line(r)))
    with model_errors_as_diagnostics(str(path)):
        run = simulate_federation(declared, path / declared.folder, data, request.settings, on_round)
    write_results(run.strategy.results(), run.course, declared, into, path)
    if screen.format == "json":
        return screen.answer_json("run", rounds=[r.to_json() for r in run.course.rounds], result=str(into))
    return _print_summary(run, declared, into, screen)


def recipe_folder(artifact_path: Path) -> Path:
    """Folder of an artifact's recipe: what paths of its data start from."""
    from ...artifacts.manifest import read_manifest
    from ...driver.judging.retest import find_recipe_file, missing_recipe

    manifest = read_manifest(artifact_path)
    file = find_recipe_file(artifact_path, manifest)
    if file is None:
        name = manifest.recipe.get("name", "its recipe")
        raise missing_recipe(
            f"{name}, whose folder the data of {artifact_path} lie in, is not beside it",
            help=f"copy {name} and its data beside {artifact_path.name}, or run from their folder",
        ).rejection()
    return file.parent


def _print_summary(run: "Federation", declaration: "Declaration", destination: Path, screen: Screen) -> None:
    from ...core.quantity import count_text, size_text
    from .noise import privacy_sentence
    from .rounds import fault_lines

    for text in fault_lines(run.course.rounds):
        screen.note(text)
    if declaration.stream:
        from .stream import forgetting_by_task

        worse = ", ".join(f"{value:+.4f}" for value in forgetting_by_task(run.course.rounds))
        screen.note(f"tasks before the last, nats per token since their own rounds: {worse}")
    if declaration.clip:
        screen.note(privacy_sentence(run.course.rounds, declaration))
    screen.note(
        f"{count_text(len(run.course.rounds), 'round')}, {size_text(run.course.bytes)} sent; states in {destination}"
    )

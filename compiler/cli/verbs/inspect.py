"""`effc inspect`: the structure of a model as effc sees it, without reading weights."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ....dsl.syntax.diagnostics import Fault, Reject
from .flags import SharedFlags, make_verb
from .options import argument, option

if TYPE_CHECKING:
    from ....dsl.checker.skeleton import Skeleton
    from ...artifacts.manifest import Manifest
    from ...plugin.target import ArtifactSummary

changed_file = Fault(
    "changed-file",
    "An artifact that is inspected has files that are not as its manifest has them.\n\n"
    "`effc verify` refuses it, and so does whatever loads it.",
    severity="warning",
)
unknown_layer = Fault("unknown-layer", "`--graph` names no repeated layer of the model.", exit="usage")

_model = argument("MODEL", "An artifact, a model folder, zoo:NAME, hf:ORG/NAME or a recipe.")
_graph = option("The program of one layer: its path, or its number.", "--graph", metavar="UNIT")


def register(app: typer.Typer) -> None:
    @make_verb(
        app,
        formats=("text", "json", "dot", "svg"),
        flag_panels=("inputs", "cache", "machine"),
        signed_arguments=("model",),
    )
    def inspect(
        model: Annotated[str, _model], shared: SharedFlags, graph: Annotated[str | None, _graph] = None
    ) -> None:
        """Draw a model: modules, shapes, heads, channels, or one layer's program."""
        if shared.format == "dot" and graph is None:
            raise typer.BadParameter("`--format dot` draws one layer: add --graph UNIT")
        _warn_of_changed_files(model, shared)
        front = _front_manifest(model)
        if shared.format == "svg" and front is None:
            raise typer.BadParameter(f"`--format svg` draws a front, and `{model}` is none")
        shared.require_environment()
        if front is not None:
            return _print_front_points(front, model, graph, shared)
        summary = _artifact_summary(model)
        if summary is not None:
            return _print_summary(summary, model, graph, shared)
        programs = _first_captured_program(model, shared) if graph is not None else None
        if programs:
            return _print_graph(programs, str(graph), shared)
        summaries = _labelled_skeletons(model, shared)
        if shared.format == "json":
            models = [{"label": label, "skeleton": s.to_json()} for label, s in summaries]
            shared.screen.answer_json("inspect", models=models)
        else:
            _print_skeletons(summaries, shared)
            _print_layer_reductions(model, shared)
        return None


def _warn_of_changed_files(location: str, shared: SharedFlags) -> None:
    """Warn of files of an artifact that are not as its manifest has them: what is drawn is what lies there now."""
    from ...artifacts.manifest import NAME, verify_files
    from ...core.events import Warned

    path = Path(location)
    if not (path / NAME).is_file():
        return
    try:
        verify_files(path)
    except Reject as rejection:
        for diagnostic in rejection.diagnostics:
            shared.screen.warn(Warned(changed_file(diagnostic.message, help=diagnostic.help)), displayed=False)


def _front_manifest(location: str) -> "Manifest | None":
    """The manifest of an artifact that holds several models."""
    from ...artifacts.manifest import NAME, read_manifest

    manifest = read_manifest(Path(location)) if (Path(location) / NAME).is_file() else None
    return manifest if manifest and manifest.members else None


def _print_front_points(front: "Manifest", location: str, layer: str | None, shared: SharedFlags) -> None:
    """A row for every point and a column for every measure, in the recipe's order."""
    from ...artifacts.front_kinds import latency_table_error, members_with_interleaved_times
    from ...core.front_chart import ascii_scatter_plot, svg_scatter_plot
    from ...core.quantity import measurement_text

    if layer is not None:
        raise unknown_layer(
            f"{location} holds {len(front.members)} models", help="inspect one of them: `effc pick` takes it out"
        ).rejection()
    members = members_with_interleaved_times(front)
    if shared.format == "json":
        points = [{"name": m["name"], "measures": m["measures"], "steps": m["steps"]} for m in members]
        return shared.screen.answer_json("inspect", points=points, latency_error=latency_table_error(front))
    marks = [(str(number), *(value for _, value, *_ in m["measures"][1::-1])) for number, m in enumerate(members, 1)]
    names = [metric for metric, *_ in front.members[0]["measures"]][1::-1]
    if shared.format == "svg":
        _require_two_measures(location, names)
        return shared.screen.answer(svg_scatter_plot(marks, *names))
    head = ("", "point", *(metric for metric, *_ in front.members[0]["measures"]))
    rows = [
        (str(number), m["name"], *(measurement_text(value, unit) for _, value, unit, _ in m["measures"]))
        for number, m in enumerate(members, 1)
    ]
    shared.screen.note(shared.screen.styled(location, "bold"))
    shared.screen.answer(shared.screen.table([head, *rows], right=tuple(range(2, len(head)))).rstrip("\n"))
    if (error := latency_table_error(front)) is not None:
        shared.screen.note(f"times were added up from a table, {error:.1%} off at most where whole models were timed")
    if len(names) == 2:
        shared.screen.note("\n" + ascii_scatter_plot(marks, *names))
    return None


def _require_two_measures(location: str, measure_names: list[str]) -> None:
    if len(measure_names) < 2:
        raise typer.BadParameter(f"a front is drawn over two measures, and {location} has one")


def _artifact_summary(location: str) -> "ArtifactSummary | None":
    """Picture of an artifact by its target, if it has one."""
    from ...artifacts.load import locate_checkpoint_and_artifact, target_class_of_folder
    from ...driver.models import is_artifact

    path = Path(location)
    if not (path.is_dir() and is_artifact(path)):
        return None
    folder, manifest = locate_checkpoint_and_artifact(path)
    return target_class_of_folder(folder, manifest[1] if manifest else None).summary(folder)


def _print_summary(summary: "ArtifactSummary", location: str, layer: str | None, shared: SharedFlags) -> None:
    if layer is not None:
        raise unknown_layer(
            f"{location} holds one plan for the whole model, and no layers",
            help="name the recipe or the model that it was compiled from",
        ).rejection()
    if shared.format == "json":
        return shared.screen.answer_json("inspect", models=[{"label": location, "plan": summary.to_json()}])
    shared.screen.note(shared.screen.styled(location, "bold"))
    shared.screen.answer(summary.to_text())
    return _print_layer_reductions(location, shared)


def _print_skeletons(summaries: "list[tuple[str, Skeleton]]", shared: SharedFlags) -> None:
    from shutil import get_terminal_size

    from ...analysis.planning.drawing import draw_skeleton

    width = min(140, max(60, get_terminal_size((100, 24)).columns))
    for label, skeleton in summaries:
        shared.screen.note(shared.screen.styled(label, "bold"))
        shared.screen.answer(draw_skeleton(skeleton, width=width).rstrip("\n"))


def _print_layer_reductions(location: str, shared: SharedFlags) -> None:
    """Draw what each layer of an artifact lost, if anything."""
    from ...analysis.planning.layer_profile import draw_layer_bars
    from ...artifacts.load import locate_checkpoint_and_artifact
    from ...artifacts.search_summary import search_summary_lines
    from ...driver.models import is_artifact

    path = Path(location)
    artifact = locate_checkpoint_and_artifact(path)[1] if path.is_dir() and is_artifact(path) else None
    if artifact is None:
        return
    manifest = artifact[1]
    for line in search_summary_lines(manifest.steps):
        shared.screen.answer(f"\nsearched: {line}")
    profile = manifest.profile
    if profile and profile["before"] != profile["after"]:
        shared.screen.answer("\n" + draw_layer_bars(profile["before"], profile["after"]))


def _labelled_skeletons(location: str, shared: SharedFlags) -> "list[tuple[str, Skeleton]]":
    """The models that a place names: a recipe may have several."""
    from ...analysis.discovery.discover import skeleton_of
    from ...driver.models import is_artifact, resolve_origin
    from ...transforms.editing.rehearsed import load_or_discover_skeleton

    path = Path(location)
    if path.is_file() and path.suffix == ".effspec":
        session = shared.session(path)
        calls = {c.word + repr(c.args): (n, c) for r in session.recipes() for n, c in r.models.items()}
        return [(f"{n} = {session.resolve_model_origin(c).label}", session.skeleton(c)) for n, c in calls.values()]
    if path.is_dir() and is_artifact(path):
        return [(location, skeleton_of(_captured_program(location, shared)))]
    origin = resolve_origin(location, shared.settings())
    return [(origin.label, load_or_discover_skeleton(origin, shared.settings()))]


def _first_captured_program(location: str, shared: SharedFlags) -> Any:
    from ...ir.capture.meta_capture import capture_on_meta

    path = Path(location)
    if path.is_file() and path.suffix == ".effspec":
        session = shared.session(path)
        first = session.recipes()[0]
        return capture_on_meta(session.resolve_model_origin(next(iter(first.models.values()))))
    return _captured_program(location, shared)


def _captured_program(location: str, shared: SharedFlags) -> Any:
    """The captured program; an artifact is loaded, since its shapes are its own."""
    from ...driver.models import is_artifact, resolve_origin
    from ...ir.capture.meta_capture import capture_on_meta

    if Path(location).is_dir() and is_artifact(Path(location)):
        from ...artifacts.load import load
        from ...ir.capture.capture import capture

        return capture(load(location, check="size"))
    return capture_on_meta(resolve_origin(location, shared.settings()))


def _print_graph(program: Any, layer: str, shared: SharedFlags) -> None:
    from ...analysis.planning.drawing import unit_as_code, unit_as_dot

    unit = _find_unit(program, layer)
    if shared.format == "dot":
        shared.screen.answer(unit_as_dot(unit).rstrip("\n"))
    elif shared.format == "json":
        from ...ir.graph_json import graph_to_json

        shared.screen.answer_json("inspect", unit=unit.path, graph=graph_to_json(unit.graph))
    else:
        shared.screen.answer(unit_as_code(unit).rstrip("\n"))


def _find_unit(program: Any, layer: str) -> Any:
    """The unit of a layer named by path, by the end of a path, or by number; Reject an unknown one."""
    paths = list(program.units)
    if not paths:
        raise unknown_layer(
            "the model's layers run several times in one forward, and none of them is drawn alone",
            help="leave `--graph` out: `effc inspect` lists its modules",
        ).rejection()
    if re.fullmatch(r"-?[0-9]{1,6}", layer) and -len(paths) <= int(layer) < len(paths):
        return program.units[paths[int(layer)]]
    matches = [p for p in paths if p == layer or p.endswith(f".{layer}")]
    if matches:
        return program.units[matches[0]]
    raise unknown_layer(
        f"the model has no layer `{layer}`", help=f"it has {len(paths)}: {paths[0]} … {paths[-1]}"
    ).rejection()

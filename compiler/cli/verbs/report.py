"""`effc report`: one HTML page of an artifact, or a page that compares several, to look at and to pass on."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .flags import SharedFlags, make_verb
from .options import argument, option

if TYPE_CHECKING:
    from ...artifacts.pages.report_data import ReportData

_artifacts = argument("ARTIFACT...", "Artifacts, or a folder that holds some.")
_output = option("Where the page goes; `-` prints it.", "-o", "--output", metavar="FILE", show_default=True)
_mlflow = option(
    "Also add a run for each artifact to MLflow's file store in this folder.", "--mlflow", metavar="FOLDER"
)


def register(app: typer.Typer) -> None:
    @make_verb(app, signed_arguments=("artifacts",))
    def report(
        artifacts: Annotated[list[Path], _artifacts],
        shared: SharedFlags,
        output: Annotated[Path, _output] = Path("report.html"),
        mlflow: Annotated[str | None, _mlflow] = None,
    ) -> None:
        """Write one HTML page of an artifact: what it measures, what was cut and how that was decided.

        Of artifacts of several pipelines or variants it is a table that compares them, with a page of each beside it.
        A page loads nothing from anywhere."""
        from ...artifacts.load import verify_artifact_files
        from ...artifacts.pages.report_data import ReportData
        from ...artifacts.results_table import artifacts_in
        from ...core.cache import write_atomic
        from ...core.quantity import size_text

        store = _checked_store_folder(mlflow) if mlflow is not None else None
        paths = [path for folder in artifacts for path in artifacts_in(folder)]
        if store and any(store.resolve().is_relative_to(path.resolve()) for path in paths):
            raise typer.BadParameter(f"`--mlflow {mlflow}` lies in an artifact: name a folder outside")
        for path in paths if not shared.signed_by else ():  # signed ones are compared already
            verify_artifact_files(path)
        reports = [ReportData.of(path) for path in paths]
        printed = str(output) == "-"
        if printed and shared.format == "json":
            raise typer.BadParameter("`-o -` prints the page, and `--format json` prints JSON: leave one of them out")
        runs = _add_mlflow_runs(reports, store, shared) if store else []
        first, *further = html_pages(reports, "" if printed else output.stem)
        if printed:
            return shared.screen.write(first)
        files = [output, *(output.with_name(f"{output.stem}-{i}.html") for i in range(1, len(further) + 1))]
        for file, text in zip(files, (first, *further), strict=True):
            write_atomic(file, text.encode())
        if shared.format == "json":
            shared.screen.answer_json(
                "report",
                path=str(output),
                bytes=len(first.encode()),
                pages=[str(file) for file in files[1:]],
                runs=runs,
            )
        else:
            beside = f", with {len(further)} beside it" if further else ""
            shared.screen.answer(f"{output}  {size_text(len(first.encode()))}, opens in any browser{beside}")
        return None


def _checked_store_folder(folder: str) -> Path:
    """Folder of MLflow's file store. Raises BadParameter where it can't be one."""
    from ...artifacts.mlflow_runs import unusable_store_reason
    from ...core.environment import check_modules

    check_modules(["mlflow"], "mlflow", "`effc report --mlflow`")
    if problem := unusable_store_reason(folder):
        raise typer.BadParameter(f"`--mlflow {folder}` {problem}")
    return Path(folder)


def _add_mlflow_runs(reports: "list[ReportData]", store: Path, shared: SharedFlags) -> list[dict[str, Any]]:
    """Add the runs and say which; as JSON."""
    from ...artifacts.mlflow_runs import StoreError, write_mlflow_runs

    try:
        runs = write_mlflow_runs(reports, store)
    except StoreError as error:
        raise typer.BadParameter(f"`--mlflow {store}`: {error}") from error
    for report, run in zip(reports, runs, strict=True):
        fact = "added" if run.added else "is there already: same digest, same measures"
        shared.screen.note(f"{store}: run {run.id} of {report.location} {fact}")
    return [
        {"id": run.id, "artifact": report.location, "added": run.added}
        for report, run in zip(reports, runs, strict=True)
    ]


def html_pages(reports: "list[ReportData]", file_stem: str) -> list[str]:
    """Page of one result; of several one that compares them, and one of each, named FILE_STEM-NUMBER.html."""
    from ...artifacts.pages.page import render_html, render_results
    from ...artifacts.results_table import results_table, results_title

    results: dict[tuple[str, ...], list[ReportData]] = {}
    for report in reports:
        results.setdefault(report.pipeline, []).append(report)
    if len(results) == 1:
        return [render_html(reports)]
    ordered = [report for same in results.values() for report in same]
    numbers = {pipeline: i for i, pipeline in enumerate(results, 1)}
    links = ["", *(f"{file_stem}-{numbers[report.pipeline]}.html" if file_stem else "" for report in ordered)]
    overview = render_results(results_title(ordered), results_table(ordered), links)
    return [overview, *(map(render_html, results.values()) if file_stem else ())]

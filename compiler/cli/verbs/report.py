"""`effc report`: one HTML page of an artifact, or a page that compares several, to look at and to pass on."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .flags import SharedFlags, make_verb
from .options import argument, option

if TYPE_CHECKING:
    from ...artifacts.pages.sheet import ReportData

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
        mlflow: Annotated[Path | None, _mlflow] = None,
    ) -> None:
        """Write one HTML page of an artifact: what it measures, what was cut and how that was decided.

        Of artifacts of several pipelines or variants it is a table that compares them, with a page of each beside it.
        A page loads nothing from anywhere."""
        from ...artifacts.pages.sheet import ReportData
        from ...artifacts.results_table import artifacts_in
        from ...core.cache import write_atomic
        from ...core.quantity import size

        if mlflow is not None:
            _refuse_unusable_store(mlflow)
        sheets = [ReportData.of(path) for folder in artifacts for path in artifacts_in(folder)]
        printed = str(output) == "-"
        if printed and shared.format == "json":
            raise typer.BadParameter("`-o -` prints the page, and `--format json` prints JSON: leave one of them out")
        if mlflow is not None:
            from ...artifacts.mlflow_runs import write_mlflow_runs

            write_mlflow_runs(sheets, mlflow)
        first, *further = pages(sheets, "" if printed else output.stem)
        if printed:
            return shared.screen.write(first)
        files = [output, *(output.with_name(f"{output.stem}-{i}.html") for i in range(1, len(further) + 1))]
        for file, text in zip(files, (first, *further), strict=True):
            write_atomic(file, text.encode())
        if shared.format == "json":
            shared.screen.answer_json(
                "report", path=str(output), bytes=len(first.encode()), pages=[str(file) for file in files[1:]]
            )
        else:
            beside = f", with {len(further)} beside it" if further else ""
            shared.screen.answer(f"{output}  {size(len(first.encode()))}, opens in any browser{beside}")
        return None


def _refuse_unusable_store(folder: Path) -> None:
    from ...core.environment import check_modules

    check_modules(["mlflow"], "mlflow", "`effc report --mlflow`")
    if folder.exists() and not folder.is_dir():
        raise typer.BadParameter(f"`--mlflow {folder}` is a file, and MLflow keeps runs in a folder")


def pages(sheets: "list[ReportData]", stem: str) -> list[str]:
    """The page of one result; of several a page that compares them, and those of each, named `STEM-NUMBER.html`."""
    from ...artifacts.pages.page import render_html, render_results
    from ...artifacts.results_table import results_table, results_title

    results: dict[tuple[str, ...], list[ReportData]] = {}
    for sheet in sheets:
        results.setdefault(sheet.pipeline, []).append(sheet)
    if len(results) == 1:
        return [render_html(sheets)]
    ordered = [sheet for same in results.values() for sheet in same]
    numbers = {pipeline: i for i, pipeline in enumerate(results, 1)}
    links = ["", *(f"{stem}-{numbers[sheet.pipeline]}.html" if stem else "" for sheet in ordered)]
    overview = render_results(results_title(ordered), results_table(ordered), links)
    return [overview, *(map(render_html, results.values()) if stem else ())]

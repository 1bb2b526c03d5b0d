"""`effc report`: one HTML page of an artifact, to look at and to pass on."""

from pathlib import Path
from typing import Annotated

import typer

from ....dsl.syntax.diagnostics import Fault, Reject
from .flags import SharedFlags, make_verb

several_pipelines = Fault(
    "several-pipelines",
    "A report was asked of artifacts that were not compiled from one pipeline of one recipe.\n\n"
    "A page shows one result in several forms, and what came of its recipe's lines. `effc diff` compares two results.",
    exit="usage",
)

_artifacts = typer.Argument(metavar="ARTIFACT...", help="Artifacts of one pipeline.", show_default=False)
_output = typer.Option("-o", "--output", metavar="FILE", help="Where the page goes; `-` prints it.")


def register(app: typer.Typer) -> None:
    @make_verb(app, signed_arguments=("artifacts",))
    def report(
        artifacts: Annotated[list[Path], _artifacts],
        shared: SharedFlags,
        output: Annotated[Path, _output] = Path("report.html"),
    ) -> None:
        """Write one HTML page of an artifact: what it measures, what was cut and how that was decided.

        The page loads nothing from anywhere."""
        from ...artifacts.pages.page import render_html
        from ...artifacts.pages.sheet import ReportData
        from ...core.cache import write_atomic
        from ...core.quantity import size

        sheets = [ReportData.of(path) for path in artifacts]
        other = next((s for s in sheets if s.pipeline != sheets[0].pipeline), None)
        if other is not None:
            raise Reject(
                several_pipelines(
                    f"{sheets[0].location} and {other.location} come from different pipelines",
                    help="write a page for each, or compare them with `effc diff`",
                )
            )
        if str(output) == "-":
            if shared.format == "json":
                raise typer.BadParameter(
                    "`-o -` prints the page, and `--format json` prints JSON: leave one of them out"
                )
            return shared.screen.write(render_html(sheets))
        text = render_html(sheets).encode()
        write_atomic(output, text)
        if shared.format == "json":
            shared.screen.answer_json("report", path=str(output), bytes=len(text))
        else:
            shared.screen.answer(f"{output}  {size(len(text))}, opens in any browser")
        return None

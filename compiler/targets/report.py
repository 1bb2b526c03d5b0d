"""One HTML page of what a pipeline gave, to look at and to pass on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..artifacts.pages.page import render_html
from ..core.cache import write_atomic
from ..plugin.target import Target

if TYPE_CHECKING:
    from ..artifacts.pages.report_data import ReportData


class Report(Target):
    """One HTML page of what a pipeline gave, to look at and to pass on.

    It shows the model's layers before and after, how each step decided, measures with their bounds, the recipe with
    what came of its lines, and where all of it comes from. It is written after the pipeline's artifacts and speaks of
    those of the same result; where there are none, of the result in memory. It is one file that loads nothing, and no
    artifact: `effc report ARTIFACT` writes the same from what an artifact keeps.

    Source: own; charts are drawn by Vega-Lite.
    Example: report("report.html")
    """

    extra: ClassVar[str] = "report"
    requires: ClassVar[tuple[str, ...]] = ("jinja2", "vl_convert")
    result_kinds = ("model", "front", "adapters")
    describes_artifacts = True
    use = "open it in a browser"

    def write_about(self, reports: "Sequence[ReportData]", file: Path) -> None:
        write_atomic(file, render_html(reports).encode())

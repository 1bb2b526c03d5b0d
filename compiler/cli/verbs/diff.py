"""`effc diff`: what two artifacts have different: shapes, measures, recipe, versions; or the results of several."""

from pathlib import Path
from typing import Annotated

import typer

from .flags import SharedFlags, make_verb
from .options import argument

_before = argument("A", "An artifact.")
_after = argument("B", "Another one.")
_artifacts = argument("[C...]", "More, to compare in one table.")


def register(app: typer.Typer) -> None:
    @make_verb(app, signed_arguments=("before", "after", "artifacts"))
    def diff(
        before: Annotated[Path, _before],
        after: Annotated[Path, _after],
        shared: SharedFlags,
        artifacts: Annotated[list[Path], _artifacts] = (),  # type: ignore[assignment]
    ) -> None:
        """Compare two artifacts: measures, shapes, steps, recipe, machine; more than two in a table of measures."""
        from ...artifacts.diff import diff_artifacts
        from ...artifacts.load import verify_artifact_files
        from ...artifacts.pages.report_data import ReportData
        from ...artifacts.results_table import results_table

        for path in (before, after, *artifacts) if not shared.signed_by else ():  # signed ones are compared already
            verify_artifact_files(path)
        if artifacts:
            table = results_table([ReportData.of(path) for path in (before, after, *artifacts)])
            if shared.format == "json":
                return shared.screen.answer_json("diff", head=table[0], rows=table[1:])
            return shared.screen.answer(shared.screen.table(table))
        difference = diff_artifacts(before, after)
        if shared.format == "json":
            shared.screen.answer_json("diff", **difference.to_json())
        else:
            shared.screen.answer(difference.to_text().rstrip("\n"))
        return None

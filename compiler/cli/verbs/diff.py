"""`effc diff`: what two artifacts have different: shapes, measures, recipe, versions."""

from pathlib import Path
from typing import Annotated

import typer

from .flags import SharedFlags, make_verb

_before = typer.Argument(metavar="A", help="An artifact.", show_default=False)
_after = typer.Argument(metavar="B", help="Another one.", show_default=False)


def register(app: typer.Typer) -> None:
    @make_verb(app, signed_arguments=("before", "after"))
    def diff(before: Annotated[Path, _before], after: Annotated[Path, _after], shared: SharedFlags) -> None:
        """Compare two artifacts: measures, shapes, steps, recipe, machine."""
        from ...artifacts.diff import diff_artifacts

        difference = diff_artifacts(before, after)
        if shared.format == "json":
            shared.screen.answer_json("diff", **difference.to_json())
        else:
            shared.screen.answer(difference.to_text().rstrip("\n"))

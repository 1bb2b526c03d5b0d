"""`effc plan`: what a compile would do to which modules, what it costs, and what the cache has already."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ....dsl.syntax.diagnostics import EXITS
from .flags import SharedFlags, make_verb, pipeline_option
from .options import argument, option
from .output import exit_code_of

_recipe = argument("RECIPE", "A recipe file.", readable=False)
_output = option("Save the plan; `compile --plan` refuses drift.", "-o", "--output", metavar="FILE")
_detailed = option(f"Exit {EXITS['work-to-do']} where there is work to do.", "--detailed-exitcode")


def register(app: typer.Typer) -> None:
    @make_verb(app, flag_panels=("inputs", "lock", "cache", "machine", "progress"))
    def plan(
        recipe: Annotated[Path, _recipe],
        shared: SharedFlags,
        output: Annotated[Path | None, _output] = None,
        detailed_exitcode: Annotated[bool, _detailed] = False,
        pipeline: Annotated[list[str], pipeline_option] = (),  # type: ignore[assignment]
    ) -> int:
        """Show what a compile will do, to what, and what it costs.

        Reads no weights."""
        from ...artifacts.artifact import refuse_unwritable_folder
        from ...driver import api

        shared.require_environment()
        if output:
            refuse_unwritable_folder(output)
        with shared.listening() as listener:
            session = shared.session(recipe, listener, pipeline)
            plans = api.plan_all_pipelines(session)
        from ...analysis.planning.plan import saved_plans_to_json  # after the recipe was checked: it imports torch
        from ...driver.judging.planned_sizes import unreachable_bounds

        unreachable = [d for p in plans for d in unreachable_bounds(session, p)]
        if output and not unreachable:
            from ...core.cache import write_atomic

            write_atomic(output, (json.dumps(saved_plans_to_json(plans), indent=1) + "\n").encode())
        if shared.format == "json":
            shared.screen.complain(unreachable, "plan", plans=[p.to_json() for p in plans])
        else:
            _print_plans(plans, shared)
            shared.screen.complain(unreachable, "plan")
        if unreachable:
            return exit_code_of(unreachable)
        if output:
            shared.screen.note(f"saved to {output}; compile with --plan {output} refuses anything else")
        work = any(p.has_work for p in plans)
        return EXITS["work-to-do"] if work and detailed_exitcode else 0


def _print_plans(plans: list, shared: SharedFlags) -> None:
    from shutil import get_terminal_size

    from ...analysis.planning.plan import plan_text

    width = min(120, max(60, get_terminal_size((100, 24)).columns))
    shared.screen.answer("\n\n".join(plan_text(p, width).rstrip("\n") for p in plans))
    if shared.verbose:
        for recipe in {id(p.recipe): p.recipe for p in plans}.values():
            _print_param_origins(recipe, shared)


def _print_param_origins(recipe, shared: SharedFlags) -> None:
    """Print where the value of every param came from."""
    from ....dsl.checker.value_text import value_text

    rows = [
        ("param", "value", "from"),
        *((name, value_text(value), recipe.origins.get(name, "recipe")) for name, value in recipe.params.items()),
    ]
    if len(rows) > 1:
        shared.screen.answer("\n" + shared.screen.table(rows))

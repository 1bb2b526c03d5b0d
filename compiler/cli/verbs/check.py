"""`effc check`: everything wrong with a recipe that can be known without weights, all at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ....dsl.syntax.diagnostics import Diagnostic, Reject
from .flags import SharedFlags, make_verb
from .options import argument, option
from .output import exit_code_of

if TYPE_CHECKING:
    from ....dsl.checker.recipe import Recipe

_recipes = argument("RECIPE...", "Recipe files.", readable=False)
_fix = option("Write corrections that are sure into the file.", "--fix")
_resolve = option("Look at models not seen before, and into data files; imports torch.", "--resolve")


def register(app: typer.Typer) -> None:
    @make_verb(app, formats=("text", "json", "github"), flag_panels=("inputs", "cache"))
    def check(
        recipes: Annotated[list[Path], _recipes],
        shared: SharedFlags,
        fix: Annotated[bool, _fix] = False,
        resolve: Annotated[bool, _resolve] = False,
    ) -> int:
        """Check recipes: all mistakes at once, each with its place."""
        diagnostics_all, good = [], []
        for path in recipes:
            variants, diagnostics = check_and_fix_file(path, shared, fix, resolve)
            diagnostics_all += diagnostics
            good += [(path, variants)] if variants else []
        print_check_result(diagnostics_all, good, shared, without_model=len(recipes) == 1)
        return exit_code_of(diagnostics_all)


def check_and_fix_file(
    path: Path, shared: SharedFlags, fix: bool, resolve: bool
) -> "tuple[Sequence[Recipe], list[Diagnostic]]":
    """The checked variants of a file, none where it has errors, and what is to be said of it."""
    session = shared.session(path)
    variants, diagnostics = _check_session(session, resolve)
    if fix and (sure := [d for d in diagnostics if d.fix and d.span and d.span.source.name == str(path)]):
        from ....dsl.syntax.render import apply_fixes
        from ...core.cache import write_atomic
        from ...core.quantity import count_text

        write_atomic(path, apply_fixes(sure[0].span.source.text, sure).encode())
        shared.screen.note(f"fixed {count_text(len(sure), 'mistake')} in {path}")
        variants, diagnostics = _check_session(session, resolve)
    return variants, diagnostics


def _check_session(session, resolve: bool) -> "tuple[Sequence[Recipe], list[Diagnostic]]":
    try:
        checked = session.check(resolve=resolve)
    except Reject as rejection:
        return (), list(rejection.diagnostics)
    broken = any(d.severity == "error" for d in checked.diagnostics)
    return () if broken else checked.recipes, list(checked.diagnostics)


def print_check_result(
    diagnostics: list[Diagnostic], sound_recipes: list, shared: SharedFlags, *, without_model: bool
) -> None:
    """Diagnostics, and a summary line for each pipeline of each sound recipe."""
    rows = [{"path": str(path), **row} for path, variants in sound_recipes for row in pipeline_summaries(variants)]
    screen = shared.screen
    screen.complain(diagnostics, "check", recipes=rows)
    if screen.format != "text" or shared.quiet:
        return
    for row in rows:
        screen.answer(
            screen.styled("ok", "green") + f": {'' if without_model else row['path'] + ': '}{pipeline_counts_line(row)}"
        )


def pipeline_summaries(variants: "Sequence[Recipe]") -> list[dict[str, Any]]:
    """Per pipeline: how many steps, artifacts, bounds; `variants` of a matrix count together."""
    first = variants[0]
    return [
        {
            "pipeline": p.name,
            "steps": len(p.steps),
            "artifacts": len(p.emits),
            "bounds": len(p.expects),
            "variants": len(variants),
        }
        for p in first.pipelines.values()
    ]


def pipeline_counts_line(row: dict[str, Any]) -> str:
    """`lean: 3 steps, 2 artifacts, 2 bounds, 3 variants`."""
    from ...core.quantity import count_text

    parts = [count_text(row[f"{noun}s"], noun) for noun in ("step", "artifact", "bound")]
    parts += [count_text(row["variants"], "variant")] if row["variants"] > 1 else []
    return f"{row['pipeline']}: {', '.join(parts)}"

"""`effc bisect`: which step, or which single cut, broke a bound."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ....dsl.checker.value_text import bound_text
from ....dsl.syntax.diagnostics import Diagnostic, Fault
from .flags import SharedFlags, make_verb
from .options import argument, option
from .output import exit_code_of

if TYPE_CHECKING:
    from ....dsl.checker.recipe import Bound
    from ...analysis.planning.plan import Plan
    from ...driver.bisect import BisectResult

unknown_gate = Fault("unknown-gate", "`effc bisect --gate` names no bound of the recipe, or several.", exit="usage")

_recipe = argument("RECIPE", "A recipe file.", readable=False)
_gate = option("The bound, or how it begins; the only one unless given.", "--gate", metavar="EXPECT")


def register(app: typer.Typer) -> None:
    @make_verb(app, flag_panels=("inputs", "lock", "cache", "machine", "progress"))
    def bisect(recipe: Annotated[Path, _recipe], shared: SharedFlags, gate: Annotated[str, _gate] = "") -> int:
        """Say which step, or which single cut, broke a bound; exit 4 where one did. What the cache has is not run.

        Where the bound holds, it is what the recipe's baseline allows for the same metric."""
        from ...driver import api
        from ...driver.judging.baseline import widest_baseline_bound

        shared.require_environment()
        with shared.listening() as listener:
            session = shared.session(recipe, listener)
            plans = api.plan_all_pipelines(session)
            of_result = [
                (p, b) for p in plans for b in p.pipeline.expects if not b.part
            ]  # of the result, not of a target
            chosen = [(p, b) for p, b in of_result if _begins_with(b, gate)]
            if len(chosen) != 1:
                raise _unknown_or_ambiguous_gate(chosen or of_result, bool(chosen), gate).rejection()
            (plan, bound), blame = chosen[0], api.bisect_bound(session, *chosen[0])
            baseline = widest_baseline_bound(session.path, plan, bound)
            if not blame.diagnostics and baseline is not None:  # the bound holds, and a baseline may allow less
                blame = api.bisect_bound(session, plan, baseline)
        return print_bisect_result(blame, shared)


def _begins_with(bound: "Bound", bound_prefix: str) -> bool:
    return "".join(bound_text(bound).split()).startswith("".join(bound_prefix.split()))


def _unknown_or_ambiguous_gate(
    candidate_bounds: "Sequence[tuple[Plan, Bound]]", is_ambiguous: bool, gate_prefix: str
) -> Diagnostic:
    texts = list(dict.fromkeys(f"`{bound_text(b)}`" for _, b in candidate_bounds))
    message = (
        f"{len(candidate_bounds)} bounds begin with `{gate_prefix}`"
        if is_ambiguous
        else f"no bound begins with `{gate_prefix}`"
    )
    help = f"--gate takes one of {', '.join(texts[:8])}" if texts else "add a bound without `in` to `expect`"
    return unknown_gate(message, help=help)


def print_bisect_result(result: "BisectResult", shared: SharedFlags) -> int:
    screen, diagnostics = shared.screen, result.diagnostics
    looks = [{"step": k.step, "word": k.word, **k.verdict.to_json()} for k in result.looks]
    cuts = [{"cut": name, "value": value if value == value else None} for name, value in result.cuts]
    if screen.format == "json":
        screen.complain(
            diagnostics,
            "bisect",
            bound=bound_text(result.bound),
            steps=looks,
            cuts=cuts,
            broken_by=_blamed_step_name(result),
        )
        return exit_code_of(diagnostics)
    screen.answer(screen.styled(bound_text(result.bound), "bold"))
    screen.answer(screen.table(bisect_rows(result), head=False, indent="  "))
    screen.complain(diagnostics, "bisect")
    if not diagnostics:
        screen.note(f"{screen.styled('ok', 'green')}: the result keeps the bound")
    return exit_code_of(diagnostics)


def _blamed_step_name(result: "BisectResult") -> str | None:
    return result.step.name if result.step else None


def bisect_rows(result: "BisectResult") -> list[tuple[str, ...]]:
    """A row for every result that was measured, and under the step that broke the bound one for each cut."""
    from ...core.quantity import measurement_text

    lines: list[tuple[str, ...]] = []
    for entry in result.looks:
        value = "" if entry.verdict.value is None else measurement_text(entry.verdict.value, entry.verdict.unit)
        cuts = result.cuts if entry.step == _blamed_step_name(result) else ()
        for number, (name, after) in enumerate(cuts, 1):
            broke = "missed" if number == len(cuts) else "ok"
            lines.append((f"  cut {number} of {result.of}", name, measurement_text(after, entry.verdict.unit), broke))
        lines.append((entry.step or "the model", entry.word, value, entry.verdict.state))
    return lines

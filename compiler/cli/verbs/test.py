"""`effc test`: is what was compiled as good, as small and as fast as the recipe demands? A gate for CI."""

import os
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from ....dsl.checker.value_text import bound_text
from ....dsl.syntax.render import diagnostics_as_json
from .flags import SharedFlags, make_verb
from .gate_report import drift_limit_text, junit_report, markdown_report, results_json, verdict_value_text
from .options import argument, option
from .output import SCHEMA, exit_code_of, json_text

if TYPE_CHECKING:
    from ...driver.judging.retest import Tested

REPORTS = (".json", ".xml", ".md")

_subject = argument("ARTIFACT|RECIPE", "An artifact, or a recipe whose artifacts exist.", readable=False)
_out = option("Where the artifacts of a recipe are.", "-o", "--output", metavar="FOLDER", show_default=True)
_bless = option("Write NAME.baseline.json beside the recipe: what later tests are held against.", "--bless")
_report = option(
    "Write the result to a file, too: .json, .xml (JUnit) or .md by its name; repeatable.", "--report", metavar="FILE"
)
_recipe = option("The recipe of an artifact, where it is not beside it.", "--recipe", metavar="FILE")


def register(app: typer.Typer) -> None:
    @make_verb(
        app,
        formats=("text", "json", "junit", "github", "md"),
        flag_panels=("inputs", "lock", "cache", "machine", "progress", "gate"),
        signed_arguments=("path",),
    )
    def test(
        path: Annotated[Path, _subject],
        shared: SharedFlags,
        output: Annotated[Path, _out] = Path("out"),
        recipe: Annotated[Path | None, _recipe] = None,
        bless: Annotated[bool, _bless] = False,
        report_file: Annotated[list[Path], _report] = (),  # type: ignore[assignment]
    ) -> int:
        """Measure again what `expect` demands, and compare with the recipe's baseline; exit 4 on a miss."""
        from ...driver import api
        from ...driver.judging import baseline
        from ...driver.judging.retest import recipe_and_params, remeasure_artifact, remeasure_recipe

        for file in report_file:
            if file.suffix not in REPORTS:
                raise typer.BadParameter(f"`--report {file}`: its name ends in none of {', '.join(REPORTS)}")
            if not file.parent.is_dir():  # said before anything is measured
                raise typer.BadParameter(f"`--report {file}`: there is no folder {file.parent}")
        if bless:
            from ...plugin.recipe_library import refuse_library_recipe

            refuse_library_recipe(path)
        if bless and path.is_dir():
            raise typer.BadParameter("`--bless` takes a recipe: a baseline holds all its artifacts")
        shared.require_environment()
        with shared.listening() as listener:
            if path.is_dir():
                file, params = recipe_and_params(path, recipe)
                session = api.open_session(file, settings=shared.settings(listener), set=params)
                baseline.read_baseline(
                    session.path
                )  # one that is broken is told before anything is planned or measured
                results = remeasure_artifact(path, session, api.plan_all_pipelines(session))
            else:
                session = shared.session(path, listener)
                if not bless:
                    baseline.read_baseline(session.path)
                results = remeasure_recipe(session, api.plan_all_pipelines(session), output, bless)
        if not bless and path.exists() and not any(r.drifts for r in results):  # one of the library's has no file here
            baseline_file = baseline.baseline_path(session.path)
            shared.screen.note(
                f"compared with no baseline: `effc test {quote(str(session.path))} --bless` writes {baseline_file}"
            )
        print_test_results(results, shared)
        for file in report_file:
            file.write_text(report_file_text(results, file.suffix), encoding="utf-8")
        if bless:
            shared.screen.note(f"wrote {baseline.baseline_path(path)}")
        return exit_code_of([d for r in results for d in r.diagnostics])


def print_test_results(results: "Sequence[Tested]", shared: SharedFlags) -> None:
    screen, diagnostics = shared.screen, [d for r in results for d in r.diagnostics]
    if screen.format == "junit":
        screen.answer(junit_report(results))
    elif screen.format == "md":
        screen.answer(markdown_report(results))
    elif screen.format in ("json", "github"):
        screen.complain(diagnostics, "test", artifacts=results_json(results))
        if screen.format == "github" and (summary := os.environ.get("GITHUB_STEP_SUMMARY")):
            with open(summary, "a", encoding="utf-8") as file:  # as GitHub wants it: other steps write there, too
                file.write(markdown_report(results) + "\n")
    else:
        screen.answer("\n\n".join(_result_text(r, shared) for r in results))
        screen.complain(diagnostics, "test")
        _print_test_summary(results, shared)


def report_file_text(results: "Sequence[Tested]", suffix: str) -> str:
    """The text of a report file."""
    if suffix == ".json":
        diagnostics_json = diagnostics_as_json([d for r in results for d in r.diagnostics])["diagnostics"]
        body = {
            "schema_version": SCHEMA,
            "verb": "test",
            "artifacts": results_json(results),
            "diagnostics": diagnostics_json,
        }
        return json_text(body) + "\n"
    return (junit_report(results) if suffix == ".xml" else markdown_report(results)) + "\n"


def _result_text(result: "Tested", shared: SharedFlags) -> str:

    screen = shared.screen
    color = {"ok": "green", "missed": "red", "skipped": "yellow", "undecided": "yellow"}
    rows = [
        (bound_text(o.bound), verdict_value_text(o), f"limit {o.limit}" if o.limit else "") for o in result.outcomes
    ]
    lines = screen.table(rows, head=False).splitlines()
    body = [
        f"  {screen.styled(f'{o.state:<9}', color[o.state])}  {line}"
        for o, line in zip(result.outcomes, lines, strict=True)
    ]
    return "\n".join([f"{screen.styled(result.pipeline, 'bold')}  {result.path}", *body, *_drift_lines(result, shared)])


def _drift_lines(result: "Tested", shared: SharedFlags) -> list[str]:
    """A line for every measure of the baseline."""
    if not result.drifts:
        return []
    screen, color = shared.screen, {"worse": "red", "undecided": "yellow", "better": "green"}
    rows = [
        (d.metric, d.text(), f"at worst {drift_limit_text(d)}" if d.limit is not None else "") for d in result.drifts
    ]
    lines = screen.table(rows, head=False).splitlines()
    return [
        "  baseline",
        *(
            f"  {screen.styled(f'{d.state:<9}', color.get(d.state, 'dim'))}  {line}"
            for d, line in zip(result.drifts, lines, strict=True)
        ),
    ]


def _print_test_summary(results: "Sequence[Tested]", shared: SharedFlags) -> None:
    from ...core.quantity import count_text

    states = [o.state for r in results for o in r.outcomes]
    parts = [f"{count_text(states.count('ok'), 'bound')} kept"] if "ok" in states else []
    uncertain = sum(o.state == "ok" and bool(o.uncertainty_reason) for r in results for o in r.outcomes)
    parts += [f"{uncertain} of them not certain"] if uncertain else []
    parts += [f"{states.count('missed')} missed"] if "missed" in states else []
    parts += [f"{states.count('skipped')} not for this machine"] if "skipped" in states else []
    parts += [f"{states.count('undecided')} undecided"] if "undecided" in states else []
    drift_states = [d.state for r in results for d in r.drifts]
    for state, text in (("worse", "worse than the baseline"), ("better", "better than the baseline")):
        parts += [f"{count_text(drift_states.count(state), 'measure')} {text}"] if state in drift_states else []
    states += ["missed" if state == "worse" else state for state in drift_states]
    head = next((state for state in ("missed", "undecided") if state in states), "ok")
    colored = shared.screen.styled(head, {"ok": "green", "undecided": "yellow"}.get(head, "red"))
    shared.screen.note(f"{colored}: {', '.join(parts)}")

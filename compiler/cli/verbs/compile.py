"""`effc compile`: run what the plan shows, and end with a table of what it gave."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ....dsl.syntax.diagnostics import Fault
from ...core.json_errors import reject_on_error
from ...core.safe_read import MANIFEST, read_json
from .flags import SharedFlags, make_verb, parse_duration, pipeline_option
from .options import argument, option
from .output import exit_code_of

if TYPE_CHECKING:
    from ...artifacts.manifest import Expectation, Manifest
    from ...driver.pipeline import Result
    from .output import Screen

unreadable_plan = Fault(
    "unreadable-plan",
    "The file given with `--plan` is not there, or is no saved plan.\n\n`effc plan RECIPE -o FILE` writes one.",
    exit="usage",
)

DUMPS = ("changed", "before", "after")

_recipe = argument("RECIPE", "A recipe file.", readable=False)
_out = option("Where artifacts go.", "-o", "--output", metavar="FOLDER", show_default=True)
_plan = option("Refuse to do anything else than this saved plan.", "--plan", metavar="FILE")
_force = option("Replace artifacts that exist.", "--force")
_workers = option(
    "Processes that score, of one thread each unless --threads says more.", "--workers", metavar="N|ray|ray:HOST:PORT"
)
_time = option(
    "Stop searches after so long, such as 30m, at the best so far.", "--max-time", metavar="TIME", parser=parse_duration
)
_dump = option("Show shapes at every step.", "--dump-ir", metavar="[=changed|before|after]")


def register(app: typer.Typer) -> None:
    @make_verb(
        app,
        formats=("text", "json", "github"),
        flag_panels=("inputs", "lock", "cache", "machine", "progress", "gate"),
        signed_arguments=(),
    )
    def compile(
        recipe: Annotated[Path, _recipe],
        shared: SharedFlags,
        output: Annotated[Path, _out] = Path("out"),
        plan: Annotated[Path | None, _plan] = None,
        force: Annotated[bool, _force] = False,
        dump_ir: Annotated[str, _dump] = "",
        workers: Annotated[str | None, _workers] = None,
        max_time: Annotated[float | None, _time] = None,
        pipeline: Annotated[list[str], pipeline_option] = (),  # type: ignore[assignment]
    ) -> int:
        """Compile a recipe into artifacts, each reopened and measured. Goes on where it was stopped."""
        started = time.monotonic()  # before torch is imported and the recipe is planned
        if dump_ir and dump_ir not in DUMPS:
            raise typer.BadParameter(f"`--dump-ir {dump_ir}` is not known here: {', '.join(DUMPS)}")
        from ...driver import api

        if workers is not None:  # empty where a script's $N is not set
            from ...driver.worker_pool import parse_workers_option

            parse_workers_option(workers)
        shared.require_environment()
        saved = _read_saved_plan(plan) if plan else None
        with shared.listening() as listener:
            session = shared.session(recipe, listener, pipeline)
            session.settings = replace(session.settings, workers=workers or "", max_time=max_time)
            results = api.build(session, output, force=force, saved_plans=saved, dump_ir=dump_ir)
        return print_compile_results(results, shared, started)


def _read_saved_plan(path: Path) -> Any:
    with reject_on_error(unreadable_plan, f"{path}", "`effc plan RECIPE -o FILE` writes a plan"):
        return read_json(path, MANIFEST)


def print_compile_results(results: "Sequence[Result]", shared: SharedFlags, started: float) -> int:
    """The table of every artifact, then the searches that had to stop and the bounds that were missed."""
    screen, missed = shared.screen, [d for r in results for d in (*r.stopped, *r.bound_diagnostics)]
    rows = [{"path": str(a.path), **manifest_summary_json(a.manifest)} for r in results for a in r.artifacts]
    if screen.format == "text":
        for result in results:
            for a in result.artifacts:
                screen.answer(artifact_summary_text(a.path, a.manifest, screen) + "\n")
            for summary in result.reports:
                screen.answer(screen.styled(f"{result.plan.pipeline.name} -> {summary.path}", "bold") + "\n")
            if accounts := divergence_table_text(result, screen):
                screen.answer(accounts + "\n")
        if table := results_text(results, screen):
            screen.answer(table + "\n")
    screen.complain(missed, "compile", artifacts=rows)
    if not missed and screen.format == "text":
        from ...core.quantity import duration_text

        screen.note(screen.styled("ok", "green") + f": compiled in {duration_text(time.monotonic() - started)}")
    return exit_code_of(missed)


def manifest_summary_json(manifest: "Manifest") -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "name": manifest.name,
        "target": manifest.kind,
        "bytes": manifest.bytes,
        "measures": [asdict(m) for m in manifest.measures],
        "expectations": [asdict(e) for e in manifest.expectations],
        "checks": [asdict(c) for c in manifest.checks],
        "accounts": [asdict(a) for a in manifest.accounts],
    }


def divergence_table_text(result: "Result", screen: "Screen") -> str:
    """The original, the program in memory and every form of all artifacts, on the same tokens; "" of no language."""
    from ...artifacts.form_losses import account_rows, merge_accounts

    losses = merge_accounts({a.path.name: a.manifest.accounts for a in result.artifacts if a.manifest.accounts})
    if not losses:
        return ""
    title = screen.styled(f"{result.plan.pipeline.name} on {losses[0].where}", "bold")
    return f"{title}\n{screen.table(account_rows(losses), right=(1, 2, 3, 4, 5), indent='  ')}".rstrip("\n")


UNCERTAIN = ", not certain"


def results_text(results: "Sequence[Result]", screen: "Screen") -> str:
    """Table that compares pipelines and variants; "" of one."""
    from ...artifacts.pages.report_data import ReportData
    from ...artifacts.results_table import results_table, results_title

    reports = [ReportData(a.path.name, a.manifest) for result in results for a in result.artifacts]
    if len({report.pipeline for report in reports}) < 2:
        return ""
    title, table = screen.styled(results_title(reports), "bold"), results_table(reports)
    return f"{title}\n{screen.table(table, right=tuple(range(3, len(table[0]) - 1)), indent='  ')}".rstrip("\n")


def artifact_summary_text(path: Path, manifest: "Manifest", screen: "Screen") -> str:
    """`small -> out/small  hf, 4.2 MiB`, and a row for every measure."""
    from ...core.quantity import size_text

    title = screen.styled(f"{manifest.name} -> {path}", "bold")
    title += screen.styled(f"  {manifest.kind}, {size_text(manifest.bytes)} on disk", "dim")
    rows = list(measure_and_bound_rows(manifest))
    if not rows:
        return title
    head = ("", "before", "after", "change", "bound", "")
    lines = screen.table([head, *rows], right=(1, 2, 3), indent="  ").splitlines()
    return "\n".join(
        [title, lines[0], *(_color_outcome(line, row[-1], screen) for line, row in zip(lines[1:], rows, strict=True))]
    )


def _color_outcome(line: str, outcome: str, screen: "Screen") -> str:
    """The outcome at the end of a line in its colour."""
    color = {"holds": "green", "fails": "red", "skipped": "yellow", "undecided": "yellow"}.get(outcome)
    color = "yellow" if outcome.endswith(UNCERTAIN) else color
    return line.removesuffix(outcome) + screen.styled(outcome, color) if color else line


def measure_and_bound_rows(manifest: "Manifest") -> list[tuple[str, ...]]:
    """Metric, before, after, change, and the bound with what came of it."""
    from ...core.quantity import change_text, interval_text, measurement_text

    rows: list[tuple[str, ...]] = []
    left = list(manifest.expectations)
    for m in manifest.measures:
        before = after = difference = ""
        if m.original is not None:
            before = measurement_text(m.original, m.unit)
        if m.compiled is not None:
            after = measurement_text(m.compiled, m.unit)
        elif m.untimed:
            after, difference = "not timed", ""
        if m.original is not None and m.compiled is not None:
            difference = change_text(m.original, m.compiled)
        bounds = [e for e in left if e.text.startswith(f"{m.metric} ")]
        left = [e for e in left if e not in bounds]
        if m.spread and difference:
            difference += f" ({', '.join(change_text(1.0, end).removesuffix(' %') for end in m.spread)})"
        if m.interval and m.ratio is not None:
            difference += f", {interval_text(m.ratio, m.interval)}"
        elif m.interval and m.compiled is not None:
            after = f"{interval_text(m.compiled, m.interval)} {m.unit}".rstrip()
        first = (m.metric, before, after, difference)
        rows.append(
            (
                *first,
                _bound_without_metric(bounds[0], m.metric) if bounds else "",
                _outcome_text(bounds[0]) if bounds else "",
            )
        )
        rows += [("", "", "", "", _bound_without_metric(e, m.metric), _outcome_text(e)) for e in bounds[1:]]
    return rows + [(e.text, "", "", "", "", _outcome_text(e)) for e in left]


def _outcome_text(expectation: "Expectation") -> str:
    return expectation.outcome + (UNCERTAIN if expectation.is_uncertain else "")


def _bound_without_metric(expectation: "Expectation", metric: str) -> str:
    return expectation.text.removeprefix(metric).strip()

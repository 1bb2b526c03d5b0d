"""`effc test`: is what was compiled as good, as small and as fast as the recipe demands? A gate for CI."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .flags import Shared, verb
from .screen import code_of

if TYPE_CHECKING:
    from ..judging.gate import Outcome
    from ..judging.retest import Tested

_place = typer.Argument(
    metavar="ARTIFACT|RECIPE",
    help="An artifact, or a recipe whose artifacts exist.",
    show_default=False,
    readable=False,
)
_out = typer.Option("-o", "--output", metavar="FOLDER", help="Where the artifacts of a recipe are.")
_recipe = typer.Option(
    "--recipe", metavar="FILE", show_default=False, help="The recipe of an artifact, where it is not beside it."
)


def register(app: typer.Typer) -> None:
    @verb(
        app, formats=("text", "json", "junit", "github", "md"), shows=("inputs", "cache", "machine", "progress", "gate")
    )
    def test(
        place: Annotated[Path, _place],
        shared: Shared,
        output: Annotated[Path, _out] = Path("out"),
        recipe: Annotated[Path | None, _recipe] = None,
    ) -> int:
        """Measure again what `expect` demands; exit 4 on a miss."""
        from ..judging.retest import test_artifact, test_recipe

        shared.check_environment()
        with shared.listening() as tell:
            if place.is_dir():
                results = test_artifact(place, recipe, shared.settings(tell))
            else:
                results = test_recipe(shared.session(place, tell), output)
        report(results, shared)
        return code_of([d for r in results for d in r.diagnostics])


def report(results: "Sequence[Tested]", shared: Shared) -> None:
    screen, found = shared.screen, [d for r in results for d in r.diagnostics]
    if screen.format == "junit":
        screen.answer(junit(results))
    elif screen.format == "md":
        screen.answer(markdown(results))
    elif screen.format in ("json", "github"):
        rows = [
            {"path": str(r.path), "pipeline": r.pipeline, "bounds": [o.to_json() for o in r.outcomes]} for r in results
        ]
        screen.complain(found, "test", artifacts=rows)
    else:
        screen.answer("\n\n".join(_drawn(r, shared) for r in results))
        screen.complain(found, "test")
        _sum_up(results, shared)


def _drawn(result: "Tested", shared: Shared) -> str:
    from ..judging.gate import bound_text

    screen = shared.screen
    color = {"ok": "green", "missed": "red", "skipped": "yellow", "undecided": "yellow"}
    rows = [(bound_text(o.bound), said(o), f"limit {o.limit}" if o.limit else "") for o in result.outcomes]
    lines = screen.table(rows, head=False).splitlines()
    body = [
        f"  {screen.styled(f'{o.state:<9}', color[o.state])}  {line}"
        for o, line in zip(result.outcomes, lines, strict=True)
    ]
    return "\n".join([f"{screen.styled(result.pipeline, 'bold')}  {result.path}", *body])


def said(outcome: "Outcome") -> str:
    """The value, and the baseline's: `5.1 against 4.3`."""
    from ..report.quantity import measured

    if outcome.value is None:
        return "not measured"
    text = measured(outcome.value, outcome.unit)
    return text if outcome.original is None else f"{text} against {measured(outcome.original, outcome.unit)}"


def _sum_up(results: "Sequence[Tested]", shared: Shared) -> None:
    from ..report.quantity import counted

    states = [o.state for r in results for o in r.outcomes]
    parts = [f"{counted(states.count('ok'), 'bound')} kept"] if "ok" in states else []
    parts += [f"{states.count('missed')} missed"] if "missed" in states else []
    parts += [f"{states.count('skipped')} not for this machine"] if "skipped" in states else []
    parts += [f"{states.count('undecided')} undecided"] if "undecided" in states else []
    head = next((state for state in ("missed", "undecided") if state in states), "ok")
    colored = shared.screen.styled(head, {"ok": "green", "undecided": "yellow"}.get(head, "red"))
    shared.screen.say(f"{colored}: {', '.join(parts)}")


def markdown(results: "Sequence[Tested]") -> str:
    """A table for a job summary or a pull request."""
    from ..judging.gate import bound_text

    marks = {"ok": "ok", "missed": "**missed**", "skipped": "skipped", "undecided": "**undecided**"}
    lines = []
    for r in results:
        lines += [f"### {r.pipeline} (`{r.path}`)", "", "| bound | measured | limit | |"]
        lines.append("|---|---|---|---|")
        for o in r.outcomes:
            lines.append(f"| `{bound_text(o.bound)}` | {said(o)} | {o.limit} | {marks[o.state]} |")
        lines.append("")
    return "\n".join(lines).rstrip("\n")


def junit(results: "Sequence[Tested]") -> str:
    """One test case per bound."""
    from xml.etree import ElementTree as xml

    from ..judging.gate import bound_text

    outcomes = [o for r in results for o in r.outcomes]
    count = {"missed": str(sum(o.state in ("missed", "undecided") for o in outcomes))}
    top = xml.Element("testsuites", name="effc test", tests=str(len(outcomes)), failures=count["missed"])
    for r in results:
        missed = str(sum(o.state in ("missed", "undecided") for o in r.outcomes))
        suite = xml.SubElement(
            top,
            "testsuite",
            name=r.pipeline,
            tests=str(len(r.outcomes)),
            failures=missed,
            skipped=str(sum(o.state == "skipped" for o in r.outcomes)),
        )
        for o in r.outcomes:
            place = {"line": str(o.bound.span.line), "file": o.bound.span.source.name} if o.bound.span else {}
            about = {"name": bound_text(o.bound), "classname": r.pipeline, **place}
            case = xml.SubElement(suite, "testcase", about)
            if o.state == "missed":
                xml.SubElement(case, "failure", message=f"{said(o)}, limit {o.limit}").text = str(r.path)
            elif o.state == "undecided":
                xml.SubElement(case, "failure", message=f"undecided: {o.undecided}").text = str(r.path)
            elif o.state == "skipped":
                xml.SubElement(case, "skipped", message=o.skipped)
    xml.indent(top)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + xml.tostring(top, encoding="unicode")

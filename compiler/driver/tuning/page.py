"""Page of a search of steps: the candidates as a picture and a table, and the recipe that came out."""

from pathlib import Path
from typing import Any

from ....dsl.checker.values import DataRef, references_in
from ...artifacts.pages.chart import (
    Chart,
    check_packages,
    color_encoding,
    point_mark,
    quantitative_encoding,
    render_chart,
)
from ...artifacts.pages.origin import measure_table_rows, origin_facts
from ...artifacts.pages.page import render_template
from ...core.cache import write_atomic
from ...core.quantity import count_text, duration_text
from .summary import (
    Row,
    indistinguishable_finalists_text,
    measured_twice_text,
    metric_names,
    reason_of_unmeasured,
    table_rows,
    trade_off_sentences,
)
from .tune import Tuned

SHORTEST, LARGEST = 0.02, 3.0  # ratios to the original between which points are drawn


def write_html_page(tuned: Tuned, path: Path) -> None:
    """Write the page of a search of steps. Raises Reject where packages of the extra `report` are missing."""
    check_packages()
    search, table = tuned.search, table_rows(tuned)
    heads = metric_names(search)
    measured = count_text(search.measured_count, "candidate")
    hint = (
        f"{measured} of {len(search.candidates)} measured in {duration_text(search.seconds)}; "
        f"{reason_of_unmeasured(search)}. "
        "Values beside the original's, on rows that no bound reads; of a first look, on 8 rows, the change alone. "
    ) + measured_twice_text(tuned)
    reports = {c: a.report for c, compiled in tuned.chosen.items() for r in compiled.results for a in r.artifacts[:1]}
    caption = f"The best at {heads[0]} among candidates that keep all bounds."
    if tuned.unmet:
        caption = "The artifact misses a bound on rows that it was not chosen by."
    elif search.is_named:
        caption = "A candidate that was asked for by its name."
    elif search.is_front:
        caption = f"Candidates that keep all bounds, and of which none is better at both {heads[0]} and {heads[1]}."
    html = render_template(
        "search.html",
        title=search.wish.pipeline.name,
        origin=search.wish.context.origin.label,
        about=caption,
        hint=hint,
        chosen=[(c.name, measure_table_rows(report)) for c, report in reports.items() if report],
        facts=next((origin_facts(report) for report in reports.values() if report), []),
        charts=_charts(tuned, table),
        neighbours=list(filter(None, (*trade_off_sentences(tuned), indistinguishable_finalists_text(tuned)))),
        head=("candidate", *heads, ""),
        rows=[(r.name, *(r.cells or ("",) * len(heads)), r.state) for r in table],
        recipes=[(c.name, compiled.recipe.read_text()) for c, compiled in tuned.chosen.items()],
    )
    write_atomic(path, html.encode())


def _charts(tuned: Tuned, table: list[Row]) -> list[Chart]:
    """Both metrics of a front; else the objective against the first metric that reads rows, if a wish has one."""
    search = tuned.search
    heads = metric_names(search)
    reading = (i for i, n in enumerate(heads) if i and references_in(dict(search.trials.metrics[n].args), DataRef))
    across = 1 if search.is_front else next(reading, 0)
    drawn = [r for r in table if r.ratios and all(SHORTEST <= r.ratios[i] <= LARGEST for i in (0, across))]
    if not across or len(drawn) < 2:
        return []
    values = [_chart_point_json(r, heads, across) for r in drawn]
    spec = {
        "data": {"values": values},
        "encoding": {
            "x": quantitative_encoding("x", f"{heads[across]}, of the original", scale={"zero": False, "padding": 40}),
            "y": quantitative_encoding("y", f"{heads[0]}, of the original", scale={"zero": False, "padding": 28}),
        },
        "layer": [
            {
                "mark": point_mark(110, stroke="var(--card)", strokeWidth=2),
                "encoding": {
                    "color": color_encoding([v["kind"] for v in values]),
                    "description": {"field": "says", "type": "nominal"},
                },
            },
            {
                "transform": [{"filter": "datum.kind == 'chosen'"}],
                "mark": {"type": "text", "dy": -14, "fontSize": 12, "color": "var(--ink)", "aria": False},
                "encoding": {"text": {"field": "name"}},
            },
        ],
    }
    title = f"{heads[0]} against {heads[across]}"
    cells = [(r.name, *(f"{r.ratios[i]:.3g}" for i in (0, across))) for r in drawn]
    sentence = f"{count_text(len(drawn), 'candidate')}: " + "; ".join(v["says"] for v in values[:20])
    return [render_chart(title, sentence, spec, ("candidate", heads[0], heads[across]), cells, height=340)]


def _chart_point_json(row: Row, heads: tuple[str, ...], x_index: int) -> dict[str, Any]:
    misses = row.state.startswith(("misses", "compiled"))  # compiled, and above a bound on unread rows
    kind = "chosen" if row.state == "chosen" else "misses a bound" if misses else "keeps bounds"
    says = f"{row.name} · {heads[0]} {row.ratios[0]:.3g} · {heads[x_index]} {row.ratios[x_index]:.3g}"
    return {"x": row.ratios[x_index], "y": row.ratios[0], "name": row.name, "kind": kind, "says": says}

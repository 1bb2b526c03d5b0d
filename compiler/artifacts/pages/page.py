"""The page: sections of what the artifacts of one pipeline say, in one HTML file that loads nothing."""

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....dsl.syntax.render import printable
from ...core.quantity import count_text, size_text
from ..load import target_facts as header_of
from ..manifest import Expectation
from .accounts import divergence_table_rows
from .chart import check_packages
from .layers import layers
from .listing import annotated_recipe_lines
from .origin import (
    Row,
    label_and_hash_of_inputs,
    measure_table_rows,
    name_size_and_sha256_of_files,
    origin_facts,
    perplexity_row,
    stage_time_and_memory,
    worst_check_by_form,
)
from .points import front_table_and_charts
from .report_data import ReportData, one_line_or_empty
from .steps import step_report_sections
from .timings import paired_timing_charts
from .ways import accuracy_against_seconds_chart

PAGE_FOLDER = Path(__file__).parent
OUTCOMES = {"holds": "✓", "fails": "✕", "undecided": "?", "skipped": "–"}
TILES = 4
NAMES = {  # of common measures, for those who don't know a recipe's words
    "params": "parameters",
    "bytes": "bytes of weights",
    "flops": "operations per token",
    "decode.p50": "time per token",
    "prefill.p50": "time to read a prompt",
}
SECTIONS = {  # anchor -> (name, what there has to be for it)
    "measured": ("Measured", ""),
    "accounts": ("Forms", "accounts"),
    "front": ("The front", "points"),
    "ways": ("Ways to answer", "ways"),
    "layers": ("Layers", "layers"),
    "steps": ("Decisions", "steps"),
    "speed": ("Speed", "timings"),
    "recipe": ("Recipe", "lines"),
    "origin": ("Origin", ""),
}


def render_html(reports: Sequence[ReportData]) -> str:
    """One page of what was compiled from one recipe: the first report speaks for the model, each for its files."""
    return render_template(
        "page.html", names=NAMES, percent=lambda s: f"{100 * s:.2f}", **_template_variables(list(reports))
    )


def render_results(title: str, table: Sequence[Sequence[str]], links: Sequence[str]) -> str:
    """One page that compares results: a table, its head first, and for each row the page that it leads to, or ""."""
    return render_template("results.html", title=title, head=table[0], rows=list(zip(links, table[1:], strict=True)))


def render_template(template: str, **content: Any) -> str:
    """A template of this folder as one HTML file, in its style and with its script."""
    check_packages()
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    loader = FileSystemLoader(PAGE_FOLDER)
    inside = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    inside.filters |= {"drawn": Markup, "coded": _backticks_to_html, "minus": _with_minus_signs}
    style, script = ((PAGE_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    html = inside.get_template(template).render(
        style=style, script=script, policy=_content_security_policy(style, script), icons=OUTCOMES, **content
    )
    return printable(html)  # bidirectional control characters could disguise the recipe


def _content_security_policy(style: str, script: str) -> str:
    """Nothing is loaded from anywhere, and only this style and this script are used."""
    sources = " ".join(f"{kind}-src '{_csp_sha256(text)}';" for kind, text in (("style", style), ("script", script)))
    return f"default-src 'none'; {sources} base-uri 'none'; form-action 'none'"


def _csp_sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _with_minus_signs(text: str) -> str:
    """Hyphens before numbers as minus signs."""
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


def _backticks_to_html(text: str) -> str:
    """Render text between backticks as code."""
    from markupsafe import Markup, escape

    parts = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


def _template_variables(reports: list[ReportData]) -> dict[str, Any]:
    first = reports[0].manifest
    rows = measure_table_rows(reports[0])
    expectations = tuple(dict.fromkeys(e for s in reports for e in s.manifest.expectations))
    sections = {
        "title": one_line_or_empty(first.name) or one_line_or_empty(first.recipe.get("name")) or "model",
        "about": _recipe_description(first.recipe.get("text", "")),
        "origin": next(
            (one_line_or_empty(label) for label in first.lock.get("inputs", {}) if not label.startswith("data ")), ""
        ),
        "targets": [
            (s.location, s.manifest.kind, size_text(s.manifest.bytes) if s.manifest.files else "") for s in reports
        ],
        "verdict_of": _worst_verdict(expectations),
        "tiles": _top_measures([*rows, *filter(None, [perplexity_row(reports[0])])], first.members),
        "tables": _distinct_measure_tables(reports),
        "accounts": divergence_table_rows(reports),
        "where": next((a.where for s in reports for a in s.manifest.accounts), ""),
        "points": front_table_and_charts(first),
        "ways": [chart_of for s in reports if (chart_of := accuracy_against_seconds_chart(s.calibration))],
        "layers": layers(first),
        "steps": step_report_sections(first),
        "timings": [t for s in reports for t in paired_timing_charts(s.manifest)],
        "lines": annotated_recipe_lines(reports),
        "facts": origin_facts(reports[0]),
        "hashes": list(dict.fromkeys(h for s in reports for h in label_and_hash_of_inputs(s))),
        "files": [(s.location, name_size_and_sha256_of_files(s)) for s in reports if s.manifest.files],
        "spent": stage_time_and_memory(reports[0]),
        "reopened": [(s.location, worst_check_by_form(s.manifest.checks)) for s in reports if s.manifest.checks],
        "opening": [(s.location, _opening_commands(s)) for s in reports if _opening_commands(s)],
    }
    return sections | {
        "sections": [(anchor, name) for anchor, (name, key) in SECTIONS.items() if not key or sections[key]]
    }


def _distinct_measure_tables(reports: list[ReportData]) -> list[tuple[str, list[Row]]]:
    """Measures of each artifact, those of the first alone where others say the same."""
    tables: list[tuple[str, list[Row]]] = []
    for report in reports:
        rows = measure_table_rows(report)
        if rows and rows not in [known for _, known in tables]:
            tables.append((report.location, rows))
    return tables


def _recipe_description(text: str) -> str:
    """Docstring of the recipe."""
    match = re.search(r'^"""(.*?)"""', text, re.S | re.M)
    return one_line_or_empty(match[1], 400) if match else ""


@dataclass(frozen=True)
class Verdict:
    outcome: str
    text: str


def _worst_verdict(expectations: Sequence[Expectation]) -> Verdict | None:
    """The worst outcome, and how many there are of it."""
    if not expectations:
        return None
    outcomes = [e.outcome for e in expectations]
    if set(outcomes) == {"holds"}:
        all_ = {1: "The expectation holds", 2: "Both expectations hold"}
        uncertain = sum(e.is_uncertain for e in expectations)
        doubt = f"{f', {uncertain} of them' if len(outcomes) > 1 else ','} not certain" if uncertain else ""
        return Verdict("holds", all_.get(len(outcomes), f"All {len(outcomes)} expectations hold") + doubt)
    worst = next(o for o in ("fails", "undecided", "skipped", outcomes[0]) if o in outcomes)
    verbs = {
        "fails": ("fails", "fail"),
        "undecided": ("is undecided", "are undecided"),
        "skipped": ("was skipped", "were skipped"),
    }
    one, many = verbs.get(worst, (one_line_or_empty(worst), one_line_or_empty(worst)))
    number = outcomes.count(worst)
    return Verdict(worst, f"{number} of {count_text(len(outcomes), 'expectation')} {one if number == 1 else many}")


def _top_measures(rows: list[Row], members: Sequence[Any]) -> list[Row]:
    """The measures that say most: size, what bounds are on, speed."""
    if members:
        return []
    ranked = sorted(rows, key=lambda row: (not row.change, row.metric == "bytes", not row.bounds))
    chosen = ranked[:TILES]
    return [row for row in rows if row in chosen and row.change]


def _opening_commands(report: ReportData) -> list[str]:
    """Commands that open the artifact, and the notes of its target."""
    folders = {name.split("/")[0] for name in report.manifest.files}
    header = header_of(report.manifest.kind)
    sentences = [text for folder, text in header.get("loads", {}).items() if folder in folders]
    use = header.get("use", "")
    return [
        *sentences,
        *([use[0].upper() + use[1:] + "."] if use else []),
        *(one_line_or_empty(n, 600) for n in report.manifest.notes),
    ]

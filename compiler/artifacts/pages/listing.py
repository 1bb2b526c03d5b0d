"""The recipe's text line by line, with what came of each line beside it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ...core.quantity import count_text, measurement_text, size_text
from .report_data import ReportData, finite_number_or_none, list_or_empty, mapping_or_empty, one_line_or_empty

LINES, COLUMNS = 2000, 1000  # that are drawn
_TOKENS = re.compile(
    r'(?P<comment>\#.*)|(?P<string>"""|"(?:[^"\\]|\\.)*"?)'
    r"|(?P<key>\b(?:effspec|use|model|data|pipeline|expect|emit|param|variant|export|in|on|as|base)\b)"
    r"|(?P<number>\b\d[\d_.]*(?:e-?\d+)?\s?(?:%|[KMG]i?B|ms|s\b)?)|(?P<name>[\w.]+)|(?P<other>\s+|.)"
)


@dataclass
class ListingLine:
    """`tokens` are (class, text); `notes` are (outcome, text), an outcome being "" where nothing was judged."""

    number: int
    tokens: list[tuple[str, str]]
    notes: list[tuple[str, str]] = field(default_factory=list)


def annotated_recipe_lines(reports: list[ReportData]) -> list[ListingLine]:
    """Sheets are of one recipe, each of another artifact."""
    manifest = reports[0].manifest
    text = [line[:COLUMNS] for line in manifest.recipe.get("text", "").splitlines()[:LINES]]
    lines = [ListingLine(i, tokens) for i, tokens in enumerate(_highlight_tokens(text), 1)]
    for report in reports:
        for at, note in _notes_by_line(report, text):
            if note not in lines[at].notes:
                lines[at].notes.append(note)
    return lines


def _highlight_tokens(text: list[str]) -> Iterator[list[tuple[str, str]]]:
    """A few classes are enough to read by: comments, texts, numbers, the language's own words."""
    inside = False  # a text of several lines
    for line in text:
        tokens: list[tuple[str, str]] = []
        for part in _TOKENS.finditer(line):
            kind = part.lastgroup or ""
            if part[0] == '"""':
                inside, kind = not inside, "string"
            elif inside:
                kind = "string"
            kind = "" if kind in ("name", "other") else kind
            if tokens and tokens[-1][0] == kind:
                tokens[-1] = (kind, tokens[-1][1] + part[0])
            else:
                tokens.append((kind, part[0]))
        yield tokens


def _notes_by_line(report: ReportData, text: list[str]) -> Iterator[tuple[int, tuple[str, str]]]:
    manifest = report.manifest
    timings = {
        one_line_or_empty(s.get("name")): s for s in map(mapping_or_empty, list_or_empty(manifest.run.get("steps")))
    }
    for step in manifest.steps:
        at = _first_matching_line_index(text, rf"^\s*{re.escape(step.get('name', ''))}\s*=")
        if at is not None and step.get("name"):
            yield (
                at,
                (
                    "",
                    _step_outcome_and_seconds_text(
                        one_line_or_empty(step.get("summary")), mapping_or_empty(timings.get(step["name"]))
                    ),
                ),
            )
    for e in manifest.expectations:
        if 0 < e.line <= len(text) and e.text in " ".join(text[e.line - 1].split()):
            unit = next((m.unit for m in manifest.measures if e.text.startswith(f"{m.metric} ")), "")
            value = measurement_text(e.value, unit) if e.value is not None else ""
            yield (
                e.line - 1,
                (e.outcome, " · ".join(filter(None, (f"{e.outcome}: {value}" if value else e.outcome, e.note)))),
            )
    at = _first_matching_line_index(text, rf"^\s*(emit\s.*)?{re.escape(manifest.kind)}\(.*{re.escape(report.location)}")
    if at is not None and report.location:
        checks = f", {count_text(len(manifest.checks), 'check')} in fresh processes" if manifest.checks else ""
        yield at, ("", f"{size_text(manifest.bytes)}{checks}")


def _step_outcome_and_seconds_text(summary: str, timing) -> str:
    seconds = finite_number_or_none(timing.get("seconds"))
    spent = (
        "from the cache"
        if timing.get("cached") is True
        else measurement_text(seconds, "s")
        if seconds is not None
        else ""
    )
    return " · ".join(filter(None, (summary, spent)))


def _first_matching_line_index(text: list[str], pattern: str) -> int | None:
    return next((i for i, line in enumerate(text) if re.search(pattern, line)), None)

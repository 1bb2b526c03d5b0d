"""Diagnostics for people, for programs and for GitHub; and their fixes put into the text."""

import json
import re
from collections.abc import Iterable
from typing import Literal
from unicodedata import category

from .diagnostics import Diagnostic, sorted_distinct_diagnostics
from .excerpt import Excerpt
from .source import Span

Format = Literal["text", "json", "github"]
SCHEMA = 1

_UNSEEN = "\N{REPLACEMENT CHARACTER}"
_COMMAND = re.compile(r"^([^\S\n]*):(?=:)|(?<=#)#(?=\w*\[)", re.M)  # of GitHub, and of Azure, TeamCity and old GitHub
_LONGEST = 4000  # characters of a message
_LINE_END = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_COLORS = {"error": "1;31", "warning": "1;33", "note": "1;36", "help": "1;32", "gutter": "1;34", "bold": "1"}


def render(diagnostics: Iterable[Diagnostic], format: Format = "text", color: bool = False) -> str:
    """Render diagnostics as text, JSON or commands of GitHub, sorted by place. Empty where there is nothing to say,
    except as JSON."""
    ordered = sorted_distinct_diagnostics(diagnostics)
    if format == "json":
        return json.dumps(diagnostics_as_json(ordered), indent=2, ensure_ascii=False)
    if format == "github":
        return "\n".join(_github_command(d) for d in ordered)
    assert format == "text", f"no format {format}"
    return "\n\n".join(_render_text(d, color) for d in ordered)


# Text


def _render_text(diagnostic: Diagnostic, color: bool) -> str:
    def paint(style: str, text: str) -> str:
        return f"\x1b[{_COLORS[style]}m{text}\x1b[0m" if color and text else text

    severity, message = (
        diagnostic.severity,
        sanitize_for_terminal(without_line_breaks(shorten_for_message(diagnostic.message))),
    )
    lines = [paint(severity, f"{severity}[{diagnostic.slug}]") + paint("bold", f": {message}")]
    if diagnostic.span:
        lines += _source_snippets(diagnostic, diagnostic.span, paint)
    for kind, sentence in (("note", diagnostic.note), ("help", diagnostic.help)):
        if sentence:
            first, *continuation = sanitize_for_terminal(shorten_for_message(sentence)).split("\n")
            lines += [f"{paint(kind, kind)}: {first}", *(f"      {line}" for line in continuation)]
    return "\n".join(lines)


def _source_snippets(diagnostic: Diagnostic, span: Span, paint) -> list[str]:
    """The primary place with the related ones of its file, then those of other files."""
    marks = {(span.source.name, span.source.text): [(span, "^", diagnostic.label)]}  # an option may be there twice
    for where, label in diagnostic.related:
        marks.setdefault((where.source.name, where.source.text), []).append((where, "-", label))
    lines = []
    for arrow, ((name, _), spans) in zip(["-->"] + [":::"] * len(marks), marks.items(), strict=False):
        line, column = spans[0][0].source.position(spans[0][0].start)
        excerpt = Excerpt(spans)
        place = f"{sanitize_for_terminal(without_line_breaks(name))}:{line}:{column}"
        lines.append(f"{' ' * (excerpt.width - 2)}{paint('gutter', arrow)} {place}")
        for gutter, text, mark in excerpt.printable_rows():
            tint = {"^": diagnostic.severity, "-": "gutter"}.get(mark)
            lines.append((paint("gutter", gutter) + (paint(tint, text) if tint else text)).rstrip())
    return lines


def sanitize_for_terminal(text: str) -> str:
    """Printable form of untrusted text: without control sequences for terminals or commands for CI runners."""
    return printable(without_ci_commands(text))


def printable(text: str) -> str:
    """Without control characters, which could drive a terminal or turn the order of its letters; spaces stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() or category(c) == "Zs" else _UNSEEN for c in text)


def without_ci_commands(text: str) -> str:
    """Without commands to a runner of CI jobs: lines that begin with `::`, and `##vso[` wherever it stands."""
    return _COMMAND.sub(lambda match: (match[1] or "") + _UNSEEN, text) if "::" in text or "##" in text else text


def shorten_for_message(text: str) -> str:
    """Shortened text for messages: names in untrusted files may have megabytes."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 40]} … ({len(text)} characters)"


def without_line_breaks(text: str) -> str:
    """A name or a fact without line ends, so that what it says does not pass for a line of ours."""
    return _LINE_END.sub(_UNSEEN, text)


# JSON


def diagnostics_as_json(diagnostics: Iterable[Diagnostic]) -> dict:
    """`status` is "refused" where there is an error, else "ok". Lines and columns count from 1."""
    ordered = sorted_distinct_diagnostics(diagnostics)
    has_error = any(d.severity == "error" for d in ordered)
    return {
        "schema_version": SCHEMA,
        "status": "refused" if has_error else "ok",
        "diagnostics": [_diagnostic_json(d) for d in ordered],
    }


def _diagnostic_json(diagnostic: Diagnostic) -> dict:
    fixes = [{**_location_json(diagnostic.fix.span), "text": diagnostic.fix.text}] if diagnostic.fix else []
    return {
        "slug": diagnostic.slug,
        "severity": diagnostic.severity,
        **_location_json(diagnostic.span),
        "message": diagnostic.message,
        "label": diagnostic.label,
        "help": diagnostic.help,
        "note": diagnostic.note,
        "related": [{**_location_json(span), "message": label} for span, label in diagnostic.related],
        "fixes": fixes,
    }


def _location_json(span: Span | None) -> dict:
    keys = ("file", "line", "column", "end_line", "end_column")
    if span is None:
        return dict.fromkeys(keys)
    return dict(
        zip(keys, (span.source.name, *span.source.position(span.start), *span.source.position(span.end)), strict=True)
    )


# GitHub


def _github_command(diagnostic: Diagnostic) -> str:
    """A workflow command: the runner turns it into an annotation of the line."""
    command = {"error": "error", "warning": "warning", "note": "notice"}[diagnostic.severity]
    properties = {}
    if diagnostic.span:
        location = _location_json(diagnostic.span)
        properties = {"file": location["file"], "line": location["line"], "col": location["column"]}
        if location["end_line"] == location["line"]:
            properties["endColumn"] = location["end_column"]
        else:
            properties["endLine"] = location["end_line"]
    properties["title"] = diagnostic.slug
    lines = [shorten_for_message(diagnostic.message)]
    lines += [f"{kind}: {text}" for kind, text in (("note", diagnostic.note), ("help", diagnostic.help)) if text]
    listed = ",".join(
        f"{key}={_escape_github_command(str(value), is_property=True)}" for key, value in properties.items()
    )
    return f"::{command} {listed}::{_escape_github_command(chr(10).join(lines))}"


def _escape_github_command(text: str, is_property: bool = False) -> str:
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if is_property else text


# Fixes


def apply_fixes(text: str, diagnostics: Iterable[Diagnostic]) -> str:
    """The text with every fix put in that lies in it; of two that overlap, the first."""
    fixes = sorted(
        {d.fix for d in diagnostics if d.fix and d.fix.span.source.text == text},
        key=lambda fix: (fix.span.start, fix.span.end),
    )
    done, at = [], 0
    for fix in fixes:
        if fix.span.start >= at:
            done += [text[at : fix.span.start], fix.text]
            at = fix.span.end
    return "".join([*done, text[at:]])

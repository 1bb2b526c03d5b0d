"""Output of the command line: the answer to stdout, everything human to stderr."""

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ....dsl.syntax.diagnostics import EXITS, Diagnostic
from ....dsl.syntax.render import (
    diagnostics_as_json,
    printable,
    render,
    sanitize_for_terminal,
    without_ci_commands,
    without_line_breaks,
)
from ...core.events import Warned

SCHEMA = 1
_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36"}
_STYLE = re.compile(rf"(\x1b\[(?:0|(?:{'|'.join(_CODES.values())})(?:;(?:{'|'.join(_CODES.values())}))*)m)")
_FOREIGN = re.compile(r"[^\x00-\x7e]|(?<=#)#(?=\w*\[)")  # the last begins a command to a runner of CI jobs
LISTED = 200  # diagnostics that are printed: a manifest may name a million files that are missing


@dataclass(frozen=True)
class Screen:
    format: str = "text"
    color: str = "auto"
    quiet: bool = False
    verbose: int = 0
    warnings: list[Diagnostic] = field(default_factory=list)  # of the run, which an answer in JSON ends with

    def colors(self, stream) -> bool:
        """NO_COLOR wins over FORCE_COLOR, a flag wins over both."""
        if self.color != "auto":
            return self.color == "always"
        if os.environ.get("NO_COLOR"):
            return False
        if os.environ.get("FORCE_COLOR"):
            return True
        return stream.isatty() and os.environ.get("TERM") != "dumb"

    def answer(self, text: str) -> None:
        """The answer as text: names in it may come from anybody."""
        print(self.strip_control(text, sys.stdout), file=sys.stdout)

    def write(self, text: str) -> None:
        """The answer byte for byte, without a line end of ours."""
        sys.stdout.write(text)

    def answer_json(self, verb: str, status: str = "ok", **body: Any) -> None:
        """The answer as one JSON object, with exit code and diagnostics."""
        if status == "ok":
            body = {"exit": 0, **body, "diagnostics": body.get("diagnostics", [])}
        warnings = [] if self.quiet else diagnostics_as_json(self.warnings)["diagnostics"]
        if warnings:
            body["diagnostics"] = [*body.get("diagnostics", []), *warnings]
        print(json_text({"schema_version": SCHEMA, "verb": verb, "status": status, **body}), file=sys.stdout)

    def warn(self, event: Warned, displayed: bool) -> None:
        """Warning of a run: to stderr at once, unless the progress there has `displayed` it, and into the answer.

        A runner of CI jobs reads it at once, since the run may not end.
        """
        if not displayed:
            self.note(event.message)
        if self.format == "github":
            self.complain([event.diagnostic])
        else:
            self.warnings.append(event.diagnostic)

    def note(self, text: str) -> None:
        """A remark for a person."""
        if not self.quiet:
            print(self.strip_control(text, sys.stderr), file=sys.stderr)

    def strip_control(self, text: str, stream) -> str:
        """A text whose control characters are our own colours alone."""
        if not self.colors(stream):
            return sanitize_for_terminal(text)
        return "".join(
            part if at % 2 else printable(part) for at, part in enumerate(_STYLE.split(without_ci_commands(text)))
        )

    def complain(self, diagnostics: Sequence[Diagnostic], verb: str = "", **body: Any) -> None:
        """Print diagnostics: text to stderr, json and github to stdout. Quiet hides all but errors."""
        if self.quiet:
            diagnostics = [d for d in diagnostics if d.severity == "error"]
        left_out = len(diagnostics) - LISTED if self.format != "json" else 0
        if left_out > 0:
            diagnostics = sorted(diagnostics, key=lambda d: d.severity != "error")[:LISTED]
        if self.format == "json":
            code = exit_code_of(diagnostics)
            self.answer_json(
                verb,
                "error" if code else "ok",
                exit=code,
                **body,
                diagnostics=diagnostics_as_json(diagnostics)["diagnostics"],
            )
        elif self.format == "github" and diagnostics:
            print(printable(render(diagnostics, "github").rstrip("\n")), file=sys.stdout)  # lines that are commands
        elif diagnostics:
            print(render(diagnostics, "text", color=self.colors(sys.stderr)).rstrip("\n"), file=sys.stderr)
        if left_out > 0:
            self.note(f"{left_out} more are left out: --format json lists all")

    def styled(self, text: str, *styles: str, stream=None) -> str:
        if not text or not self.colors(stream or sys.stdout):
            return text
        return f"\x1b[{';'.join(_CODES[s] for s in styles)}m{text}\x1b[0m"

    def table(
        self, rows: Iterable[Sequence[str]], *, right: Sequence[int] = (), head: bool = True, indent: str = ""
    ) -> str:
        """Columns two spaces apart; the first row is dim where `head`, columns in `right` are set right."""
        rows = [list(map(without_line_breaks, r)) for r in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for number, row in enumerate(rows):
            padded = [
                c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ]
            line = indent + "  ".join(padded).rstrip()
            lines.append(self.styled(line, "dim") if head and number == 0 else line)
        return "\n".join(lines)


def json_text(body: Any) -> str:
    """A body as JSON that people can read, and that drives neither a terminal nor a runner of CI jobs."""
    return _FOREIGN.sub(_escape, json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False))


def _escape(match: re.Match[str]) -> str:
    """A character of a JSON text that a machine would act on, or that has no encoding, as JSON writes it in ASCII."""
    sign = match[0]
    return "\\u0023" if sign == "#" else sign if sign.isprintable() else json.dumps(sign)[1:-1]


def exit_code_of(diagnostics: Iterable[Diagnostic]) -> int:
    """The exit code: of the first error, else of an interruption, else 0."""
    all_diagnostics = list(diagnostics)
    errors = [d.exit for d in all_diagnostics if d.severity == "error"]
    stopped = [d.exit for d in all_diagnostics if d.slug == "interrupted"]
    return (errors + stopped + [EXITS["success"]])[0]

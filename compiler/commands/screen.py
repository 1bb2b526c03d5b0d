"""Where the command line writes: the answer to stdout, everything human to stderr."""

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...dsl.diagnostics import EXITS, Diagnostic
from ...dsl.render import on_a_line, visible

SCHEMA = 1
_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36"}
_STYLE = re.compile(rf"(\x1b\[(?:0|(?:{'|'.join(_CODES.values())})(?:;(?:{'|'.join(_CODES.values())}))*)m)")
_FOREIGN = re.compile(r"[^\x00-\x7e]")


@dataclass(frozen=True)
class Screen:
    format: str = "text"
    color: str = "auto"
    quiet: bool = False
    verbose: int = 0

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
        print(self.shown(text, sys.stdout), file=sys.stdout)

    def write(self, text: str) -> None:
        """The answer byte for byte, without a line end of ours."""
        sys.stdout.write(text)

    def answer_json(self, verb: str, status: str = "ok", **body: Any) -> None:
        """The answer as one JSON object."""
        whole = {"schema_version": SCHEMA, "verb": verb, "status": status, **body}
        text = json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False)
        print(_FOREIGN.sub(_escape, text), file=sys.stdout)

    def say(self, text: str) -> None:
        """A remark for a person."""
        if not self.quiet:
            print(self.shown(text, sys.stderr), file=sys.stderr)

    def shown(self, text: str, stream) -> str:
        """A text whose control characters are our own colours alone."""
        if not self.colors(stream):
            return visible(text)
        return "".join(part if at % 2 else visible(part) for at, part in enumerate(_STYLE.split(text)))

    def complain(self, diagnostics: Sequence[Diagnostic], verb: str = "", **body: Any) -> None:
        """Print diagnostics: text to stderr, json and github to stdout. Quiet hides all but errors."""
        from ...dsl.render import as_json, render

        if self.quiet:
            diagnostics = [d for d in diagnostics if d.severity == "error"]
        if self.format == "json":
            code = code_of(diagnostics)
            self.answer_json(
                verb, "error" if code else "ok", exit=code, **body, diagnostics=as_json(diagnostics)["diagnostics"]
            )
        elif self.format == "github" and diagnostics:
            self.answer(render(diagnostics, "github").rstrip("\n"))
        elif diagnostics:
            print(render(diagnostics, "text", color=self.colors(sys.stderr)).rstrip("\n"), file=sys.stderr)

    def styled(self, text: str, *styles: str, stream=None) -> str:
        if not text or not self.colors(stream or sys.stdout):
            return text
        return f"\x1b[{';'.join(_CODES[s] for s in styles)}m{text}\x1b[0m"

    def table(
        self, rows: Iterable[Sequence[str]], *, right: Sequence[int] = (), head: bool = True, indent: str = ""
    ) -> str:
        """Columns two spaces apart; the first row is dim where `head`, columns in `right` are set right."""
        rows = [list(map(on_a_line, r)) for r in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for number, row in enumerate(rows):
            padded = [
                c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ]
            line = indent + "  ".join(padded).rstrip()
            lines.append(self.styled(line, "dim") if head and number == 0 else line)
        return "\n".join(lines)


def _escape(found: re.Match[str]) -> str:
    """A character of a JSON text that a terminal would act on, or that has no encoding, as JSON writes it in ASCII."""
    return found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1]


def code_of(diagnostics: Iterable[Diagnostic]) -> int:
    """The exit code: of the first error, else of an interruption, else 0."""
    found = list(diagnostics)
    errors = [d.exit for d in found if d.severity == "error"]
    stopped = [d.exit for d in found if d.slug == "interrupted"]
    return (errors + stopped + [EXITS["success"]])[0]

"""Output of a model, in pieces, for a terminal or a pipe: text, never commands."""

import re

from ....dsl.syntax.render import printable, without_ci_commands

_OPEN = re.compile(r"(?:^|(?<=\n))[^\S\n]*:\Z|#+\w*\Z")  # of a line that may yet become a command to a runner
_MAX_VALUE = 64  # characters that are held back


class SafeText:
    """Text without control characters, and without commands to a runner of CI jobs, however its pieces are cut.

    A terminal is driven by the former wherever it shows them later; a runner reads along with what a job prints.
    """

    def __init__(self) -> None:
        self._tail, self._is_prefix = "", True  # what is held back; whether it begins a line

    def safe_part(self, text: str) -> str:
        """Text so far that can't be the beginning of a command."""
        text = self._tail + text
        opened = _OPEN.search(text if self._is_prefix else f"x{text}")
        at = len(text) if opened is None else opened.start() - (not self._is_prefix)
        at = at if len(text) - at <= _MAX_VALUE else len(text)
        return self._escape_and_keep_tail(text, at)

    def remaining_text(self) -> str:
        """The rest."""
        return self._escape_and_keep_tail(self._tail, len(self._tail))

    def _escape_and_keep_tail(self, text: str, end: int) -> str:
        free, self._tail = text[:end], text[end:]
        if not free:
            return ""
        safe = without_ci_commands(free) if self._is_prefix else without_ci_commands(f"x{free}")[1:]
        _, line_end, line = free.rpartition("\n")
        self._is_prefix = not line.strip() and (
            self._is_prefix or bool(line_end)
        )  # spaces before a command do not hide it
        return printable(safe)

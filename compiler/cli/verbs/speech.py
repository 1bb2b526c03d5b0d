"""What a model says, in pieces, to a terminal or to whoever reads a pipe: words, never commands."""

import re

from ....dsl.syntax.render import inert, printable

_OPEN = re.compile(r"(?:^|(?<=\n))[^\S\n]*:\Z|#+\w*\Z")  # of a line that may yet become a command to a runner
_MOST = 64  # characters that are held back


class Speech:
    """Text without control characters, and without commands to a runner of CI jobs, however its pieces are cut.

    A terminal is driven by the former wherever it shows them later; a runner reads along with what a job prints.
    """

    def __init__(self) -> None:
        self._tail, self._begins = "", True  # what is held back; whether it begins a line

    def push(self, text: str) -> str:
        """What of the text so far can't be the beginning of a command."""
        text = self._tail + text
        opened = _OPEN.search(text if self._begins else f"x{text}")
        at = len(text) if opened is None else opened.start() - (not self._begins)
        at = at if len(text) - at <= _MOST else len(text)
        return self._emit(text, at)

    def end(self) -> str:
        """The rest."""
        return self._emit(self._tail, len(self._tail))

    def _emit(self, text: str, at: int) -> str:
        free, self._tail = text[:at], text[at:]
        if not free:
            return ""
        safe = inert(free) if self._begins else inert(f"x{free}")[1:]
        _, line_end, line = free.rpartition("\n")
        self._begins = not line.strip() and (self._begins or bool(line_end))  # spaces before a command do not hide it
        return printable(safe)

"""One line of JSON a request: who, what, how it ended, never a word of what was asked or answered."""

import json
import queue
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from ....dsl.syntax.diagnostics import Fault

unwritable_log = Fault(
    "unwritable-log", "The file that a server was to write its log to can't be opened.", exit="usage"
)

_WAITING = 10_000  # lines that may wait for a slow reader; what is more is counted and dropped


class AccessLog:
    """Lines go through a thread of its own: whoever reads them slowly holds up no answer."""

    def __init__(self, out: TextIO | None):
        self._out, self._dropped = out, 0
        self._lines: queue.Queue[str] = queue.Queue(_WAITING)
        if out is not None:
            threading.Thread(target=self._write_lines_forever, name="effc-log", daemon=True).start()

    def log_request(self, **line: Any) -> None:
        if self._out is None:
            return
        stamp = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        fields = {name: value for name, value in line.items() if value is not None}
        try:
            if self._dropped:
                fields["dropped"], self._dropped = self._dropped, 0
            self._lines.put_nowait(json.dumps({"time": stamp, **fields}))
        except queue.Full:
            self._dropped = fields.get("dropped", 0) + 1

    def close(self) -> None:
        """Wait for the lines so far, a second at most."""
        if self._out is not None:
            waiting = threading.Thread(target=self._lines.join, daemon=True)
            waiting.start()
            waiting.join(1)

    def _write_lines_forever(self) -> None:
        assert self._out is not None, "a log that goes nowhere has no thread"
        while True:
            line = self._lines.get()
            try:
                self._out.write(line + "\n")
                self._out.flush()
            except (OSError, ValueError):  # nobody reads any more; answers go on
                pass
            finally:
                self._lines.task_done()


def open_access_log(destination: str) -> AccessLog:
    """`-` is stderr, `none` is nowhere, anything else a file that lines are added to."""
    if destination == "none":
        return AccessLog(None)
    if destination == "-":
        return AccessLog(sys.stderr)
    try:
        return AccessLog(Path(destination).open("a", encoding="utf-8"))
    except OSError as error:
        raise unwritable_log(
            f"`{destination}` can't be written: {(error.strerror or str(error)).lower()}",
            help="name a file in a folder that exists, `-` for stderr or `none`",
        ).rejection() from error

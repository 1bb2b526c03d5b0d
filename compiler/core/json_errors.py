"""Short descriptions of errors in JSON text, as the messages of libraries vary too much to quote."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from ...dsl.syntax.diagnostics import Fault
from .safe_read import MALFORMED

_ANNOUNCES = re.compile(r"(Class v|V)alidation error for ")  # of huggingface_hub, what is wrong stands below
_KIND = re.compile(r"^(Type|Value)Error: (?=.)")

FILE_ERRORS = (OSError, SafetensorError, *MALFORMED)


@contextmanager
def reject_on_error(
    fault: Fault,
    message_start: str,
    help: str = "",
    *,
    error_types: type[Exception] | tuple[type[Exception], ...] = FILE_ERRORS,
) -> Iterator[None]:
    """Raises Reject in place of what reading a file raises that anybody may have written: `message_start`, and why."""
    try:
        yield
    except error_types as error:
        raise fault(f"{message_start}: {describe_json_error(error)}", help=help).rejection() from error


def describe_json_error(error: Exception) -> str:
    """Describe an error of reading `json.loads(data.decode())`: "line 3, column 7", "byte 12 is not UTF-8", "nested too
    deep", and the system's word for a file that can't be read; what our own checks raise says it itself."""
    if isinstance(error, json.JSONDecodeError):
        return f"it breaks at line {error.lineno}, column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not {error.encoding.upper()}"
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    if isinstance(error, KeyError):
        return f"it has no `{str(error.args[0])[:80]}`"
    return "it is nested too deep" if isinstance(error, RecursionError) else first_line(error)


def first_line(error: BaseException) -> str:
    """First line of a library's message, short enough for a note; lines that only announce the next are skipped."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    while len(lines) > 1 and lines[0].endswith(":"):
        lines[:2] = [lines[1] if _ANNOUNCES.match(lines[0]) else f"{lines[0]} {lines[1]}"]
    return _KIND.sub("", lines[0])[:200].rstrip(".")

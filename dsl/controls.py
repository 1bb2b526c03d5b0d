"""Characters that no name, path or text of a recipe has: they would drive a terminal, or end a line of ours."""

from unicodedata import category

from .diagnostics import Diagnostic, Fault
from .source import Span

control_character = Fault(
    "control-character",
    "A name, a path or a text holds a control character.\n\n"
    "Such characters drive terminals, end lines of what is printed, and end paths early. Docstrings and the few texts "
    "that are more than a name or a path may hold tabs and line ends.",
)

LINES = "\n\r\t"


def control_in(text: str, lines: bool = False) -> str:
    """The first control character of a text, "" where it has none; with `lines`, tabs and line ends are none."""
    if text.isprintable():
        return ""
    return next((c for c in text if category(c) in ("Cc", "Cs", "Zl", "Zp") and not (lines and c in LINES)), "")


def refused(what: str, found: str, span: Span | None = None) -> Diagnostic:
    """What is said of a control character that a text holds; `what` is how the text is called."""
    known = {"\n": "a line end", "\r": "a carriage return", "\t": "a tab", "\x1b": "escape"}
    kind = known.get(found) or ("half a character" if category(found) == "Cs" else "a control character")
    return control_character(f"{what} holds U+{ord(found):04X}, {kind}", span, help="leave it out")

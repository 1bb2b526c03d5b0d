"""Characters that no name, path or text of a recipe has: they would drive a terminal, end a line of ours, or show
letters in another order than they stand in."""

from unicodedata import bidirectional, category

from .diagnostics import Diagnostic, Fault
from .source import Span

control_character = Fault(
    "control-character",
    "A name, a path or a text holds a control character.\n\n"
    "Such characters drive terminals, end lines of what is printed, end paths early, or turn the order in which "
    "letters are shown. Docstrings and the few texts that are more than a name or a path may hold tabs, line ends and "
    "turns.",
)

LINES = "\n\r\t"
BIDI_CONTROLS = (
    "LRE",
    "RLE",
    "LRO",
    "RLO",
    "PDF",
    "LRI",
    "RLI",
    "FSI",
    "PDI",
)  # (Boucher and Anderson, arXiv 2111.00169)


def control_in(text: str, lines: bool = False) -> str:
    """The first control character of a text, "" where it has none; with `lines`, tabs and line ends are none, nor is
    what turns letters."""
    if text.isprintable():
        return ""
    return next((c for c in text if _drives(c, lines)), "")


def _drives(c: str, lines: bool) -> bool:
    if lines and (c in LINES or bidirectional(c) in BIDI_CONTROLS):  # texts in two directions need them
        return False
    return category(c) in ("Cc", "Cs", "Zl", "Zp") or bidirectional(c) in BIDI_CONTROLS


def control_character_error(label: str, character: str, span: Span | None = None) -> Diagnostic:
    """Diagnostic for a control character in a text; `label` names the text."""
    known = {"\n": "a line end", "\r": "a carriage return", "\t": "a tab", "\x1b": "escape"}
    kind = known.get(character) or ("half a character" if category(character) == "Cs" else "a control character")
    kind = "which turns the order of letters" if bidirectional(character) in BIDI_CONTROLS else kind
    return control_character(f"{label} holds U+{ord(character):04X}, {kind}", span, help="leave it out")

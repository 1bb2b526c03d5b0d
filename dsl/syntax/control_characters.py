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


def first_control_character(text: str, allow_line_breaks: bool = False) -> str:
    """The first control character of a text, "" where it has none.

    allow_line_breaks   whether tabs, line ends and what turns letters are none
    """
    if text.isprintable():
        return ""
    return next((c for c in text if _is_control(c, allow_line_breaks)), "")


def _is_control(character: str, allow_line_breaks: bool) -> bool:
    if allow_line_breaks and (
        character in LINES or bidirectional(character) in BIDI_CONTROLS
    ):  # texts in two directions need them
        return False
    return category(character) in ("Cc", "Cs", "Zl", "Zp") or bidirectional(character) in BIDI_CONTROLS


def control_character_error(label: str, character: str, span: Span | None = None) -> Diagnostic:
    """Diagnostic for a control character in a text; `label` names the text."""
    known = {"\n": "a line end", "\r": "a carriage return", "\t": "a tab", "\x1b": "escape"}
    kind = known.get(character) or ("half a character" if category(character) == "Cs" else "a control character")
    kind = "which turns the order of letters" if bidirectional(character) in BIDI_CONTROLS else kind
    return control_character(f"{label} holds U+{ord(character):04X}, {kind}", span, help="leave it out")

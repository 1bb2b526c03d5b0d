"""Text to tokens, by the terminals of grammar.lark. It never stops: what is no token becomes a broken one."""

import re
from functools import cache

from lark import Lark, Token
from lark.lexer import PatternStr

from . import tables
from .ast import Comment
from .edition import HEADS
from .source import Source, Span

# Tokens that no rule of the grammar mentions, so the parser stops at them. `FOREIGN` goes before the
# terminals, which would match parts of it; the others are what no terminal matches.
FOREIGN = r"(?P<FOREIGN>\.(?=[0-9])|//|/\*|\*/|---+|!=|=>|:=|->|&&|\|\||[-+*/]=|\*\*|\.\.\.)"
BROKEN = (
    r'(?P<OPEN_LONG_STRING>"""[^\r\n]*(?:\r?\n(?!(?:' + "|".join(HEADS) + r")\b)[^\r\n]*)*+)"
    r'|(?P<OPEN_STRING>"[^\r\n]*)'
    r"|(?P<QUOTED>'[^'\r\n]*'|[‘“][^’”\r\n]*[’”])"
    r"|(?P<STRANGE>[^\x00-\x7F]+|.)"
)


@cache
def load_or_build_parser() -> Lark:
    return tables.load_precomputed_parser() or tables.build_parser()


@cache
def terminal_by_keyword() -> dict[str, str]:
    """Words of the grammar and their terminals: `{"pipeline": "PIPELINE"}`."""
    return {
        t.pattern.value: t.name
        for t in load_or_build_parser().terminals
        if isinstance(t.pattern, PatternStr) and t.pattern.value.isalpha()
    }


@cache
def _compile_token_pattern() -> re.Pattern:
    signs = [t for t in load_or_build_parser().terminals if t.name not in terminal_by_keyword().values()]
    signs.sort(
        key=lambda t: (
            t.name != "SPACE",
            t.name != "COMMENT",
            -t.priority,
            isinstance(t.pattern, PatternStr),
            -len(t.pattern.value),
        )
    )
    known = "|".join(f"(?P<{t.name}>{t.pattern.to_regexp()})" for t in signs)
    return re.compile(f"{FOREIGN}|{known}|{BROKEN}", re.DOTALL)


def tokenize(source: Source) -> tuple[list[Token], list[Comment]]:
    """Tokens with lines and columns, an end token last; and comments. Keywords are scanned as names."""
    tokens, comments = [], []
    line, line_start, last_line = 1, 0, 0  # last_line: where the last token ended
    for match in _compile_token_pattern().finditer(source.text):
        kind, value, start, end = str(match.lastgroup), match[0], match.start(), match.end()
        if kind == "COMMENT":
            comments.append(Comment(value[1:].strip(), last_line != line, span=Span(source, start, end)))
        elif kind != "SPACE":
            tokens.append(Token(kind, value, start, line, start - line_start + 1, end_pos=end))
        newlines = value.count("\n") if kind in ("SPACE", "LONG_STRING", "OPEN_LONG_STRING") else 0
        if newlines:
            line += newlines
            line_start = start + value.rindex("\n") + 1
        if kind not in ("SPACE", "COMMENT"):
            last_line = line
            tokens[-1].end_line = line
    size = len(source.text)
    tokens.append(Token("$END", "", size, line, size - line_start + 1, line, size - line_start + 1, size))
    return tokens, comments

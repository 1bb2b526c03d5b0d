"""Site of a syntax error: the tokens around it, open brackets, and where parsing can resume."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .edition import HEADS
from .source import Source, Span

OPENERS = {"LPAR": ")", "LSQB": "]", "LBRACE": "}"}
CLOSERS = {"RPAR": "LPAR", "RSQB": "LSQB", "RBRACE": "LBRACE"}

# What follows the keyword of a statement.
_AFTER_HEAD = {
    "use": (("NAME",), ("DOTTED",), ("STRING",)),
    "param": (("NAME", "COLON"), ("NAME", "EQUAL")),
    "model": (("NAME", "EQUAL"),),
    "data": (("NAME", "EQUAL"),),
    "profile": (("NAME", "LBRACE"),),
    "matrix": (("LBRACE",), ("NAME", "COLON")),
    "pipeline": (("NAME", "LPAR"), ("NAME", "LBRACE")),
    "expect": (("NAME", "LBRACE"),),
    "emit": (("NAME", "LBRACE"),),
}
_NO_STATEMENT = {"COLON", "COMMA", "EQUAL", "COMPARE", "LPAR", "RPAR", "RSQB", "RBRACE"}

# How an item of a block begins, after its first word.
_AFTER_WORD = {
    "profile": ("COLON", "EQUAL"),
    "matrix": ("COLON", "EQUAL"),
    "pipeline": ("EQUAL", "COLON"),
    "expect": ("COMPARE", "EQUAL", "LPAR", "NAME"),
    "emit": ("LPAR",),
}


@dataclass(frozen=True)
class ErrorSite:
    """expected: terminals that would fit. start: first token of the broken item. block: the open `{`."""

    source: Source
    tokens: list
    deep: bool
    expected: frozenset
    start: int
    stop: int
    block: int | None
    statement: int | None

    @cached_property
    def at(self) -> int:
        """The token to blame: the first that begins a new statement or step, or where the parser stopped."""
        for i in range(self.start + (self.block is None), self.stop):
            if self.begins_statement(i) or (i > self.start and self.begins_step(i)):
                return i
        return self.stop

    @property
    def token(self) -> Any:
        return self.tokens[self.at]

    @property
    def previous(self) -> Any:
        return self.tokens[max(self.at - 1, 0)]

    @property
    def following(self) -> Any:
        return self.tokens[min(self.at + 1, len(self.tokens) - 1)]

    @property
    def statement_keyword(self) -> str:
        """The keyword of the statement that the broken item belongs to; empty between statements."""
        between = self.block is None and self.start == self.stop
        return "" if self.statement is None or between else str(self.tokens[self.statement])

    @cached_property
    def open_brackets(self) -> list[int]:
        """Indices of the brackets and braces not closed before the token to blame, outermost first."""
        stack = [] if self.block is None else [self.block]
        for i in range(self.start, self.at):
            kind = self.tokens[i].type
            if kind in OPENERS and i != self.block:
                stack.append(i)
            elif stack and self.tokens[stack[-1]].type == CLOSERS.get(kind):
                stack.pop()
        return stack

    @property
    def innermost_bracket(self) -> str:
        """The innermost bracket open inside the item, as a kind of token: `LBRACE` holds shares; "" for none."""
        return (
            ""
            if not self.open_brackets or self.open_brackets[-1] == self.block
            else self.tokens[self.open_brackets[-1]].type
        )

    def span(self, token) -> Span:
        """Of a token, or of its first line. The end of the file is where its text ends."""
        if token.type == "$END":
            end = len(self.source.text.rstrip())
            return Span(self.source, end, end)
        return Span(self.source, token.start_pos, token.start_pos + len(token.split("\n")[0].rstrip("\r")))

    # Where reading can resume

    def is_first_on_line(self, i: int) -> bool:
        return i == 0 or self.tokens[i - 1].end_line < self.tokens[i].line

    def _are_followed_by(self, i: int, token_types) -> bool:
        return all(
            i + k + 1 < len(self.tokens) and self.tokens[i + k + 1].type == kind for k, kind in enumerate(token_types)
        )

    def begins_statement(self, i: int) -> bool:
        """Whether a statement begins here, as far as layout and the next words tell."""
        token = self.tokens[i]
        if token.type != "NAME" or token not in HEADS or not self.is_first_on_line(i):
            return False
        if token.column == 1 and self.tokens[i + 1].type not in _NO_STATEMENT:
            return True
        return any(self._are_followed_by(i, kinds) for kinds in _AFTER_HEAD[token])

    def begins_step(self, i: int) -> bool:
        """Whether, inside the parentheses of a step that was not closed, the next step begins here."""
        if self.block is None or self.statement is None or not self.is_first_on_line(i):
            return False
        if self.tokens[self.statement] != "pipeline":
            return False
        shape = any(self._are_followed_by(i, ("EQUAL", kind, "LPAR")) for kind in ("NAME", "DOTTED"))
        return shape and self.tokens[i].type == "NAME" and self.tokens[i].column <= self.tokens[self.start].column

    def next_statement_index(self, i: int) -> int:
        last = len(self.tokens) - 1
        while i < last and not self.begins_statement(i):
            i += 1
        return min(i, last)

    def next_item_or_end_index(self, i: int) -> int:
        """The next item of the open block, its closing brace, the next statement or the end."""
        assert self.statement is not None, "an item stands in a statement's block"
        last = len(self.tokens) - 1
        open: list[str] = []
        after = _AFTER_WORD[self.tokens[self.statement]]
        for k in range(self.start, min(i, last)):
            self._update_brackets(open, self.tokens[k].type)
        while i < last:
            token = self.tokens[i]
            if self.begins_statement(i) or (
                token.type == "RBRACE" and "LBRACE" not in open and self._brace_closes_block(i)
            ):
                return i
            if token.type in ("NAME", "DOTTED") and self.is_first_on_line(i):
                shape = self.tokens[i + 1].type in after
                aligned = token.column <= self.tokens[self.start].column
                if (shape and (aligned or not open)) or (aligned and not open):
                    return i
            self._update_brackets(open, token.type)
            i += 1
        return last

    def _brace_closes_block(self, i: int) -> bool:
        """Whether a brace stands where one closes a block: first or last on its line, and not as in `})`."""
        following = self.tokens[i + 1]
        if following.line > self.tokens[i].line or self.is_last_or_before_statement(i + 1):
            return True
        return self.is_first_on_line(i) and following.type not in ("RPAR", "RSQB", "COMMA")

    @staticmethod
    def _update_brackets(open_brackets: list[str], token_type: str) -> None:
        """Open or close a bracket; one that closes also closes what was left open inside it."""
        if token_type in OPENERS:
            open_brackets.append(token_type)
        elif CLOSERS.get(token_type) in open_brackets:
            while open_brackets.pop() != CLOSERS[token_type]:
                pass

    def is_last_or_before_statement(self, i: int) -> bool:
        return i == len(self.tokens) - 1 or self.begins_statement(i)

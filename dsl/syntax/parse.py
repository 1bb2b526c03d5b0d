"""Text to syntax tree, however broken: one diagnostic per broken statement or step, the rest is read.

Lark's tables decide what is grammatical; this file feeds them. Before every statement and every item of a
block (a step, an entry, a bound, a target) it remembers the parser's stacks. Where a token does not fit,
`slips` says what is wrong. If it also says which token was meant, parsing goes on with that; otherwise the
stacks go back to the start of the item, and reading resumes at the next item, closing brace or statement.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from .ast import File
from .diagnostics import Diagnostic, Fault, Fix, sorted_distinct_diagnostics
from .edition import DEPTH, EDITION, HEADS
from .source import Source, Span
from .source_file import LIMIT, read_source, too_large_diagnostic

if TYPE_CHECKING:
    from lark import Tree

__all__ = ["Parsed", "parse", "read_source"]

missing_edition = Fault("missing-edition", "A recipe does not start with the edition of the language it is written in.")
unknown_edition = Fault(
    "unknown-edition", "A recipe is written in an edition of the language that this effc does not read."
)
more_mistakes = Fault("more-mistakes", "A file has more mistakes than are worth showing.", severity="note")

HEAD_TERMINALS = {head.upper() for head in HEADS}
MAX_ITEMS = 50  # mistakes reported per file
REPAIRS = 20  # of one item, before the rest of it is dropped


@dataclass(frozen=True)
class Parsed:
    """`file` holds what could be read."""

    file: File
    diagnostics: tuple[Diagnostic, ...]


@lru_cache(maxsize=32)  # a module is read by every check of a recipe that uses it
def parse(source: Source) -> Parsed:
    if len(source.text) > LIMIT:
        fault = too_large_diagnostic(source.name, len(source.text)).at(Span(source, 0, 0))
        return Parsed(File(source, EDITION, None, ()), (fault,))
    from .lexer import tokenize
    from .tree_builder import TreeBuilder  # lark costs 60 ms: only those who parse pay

    tokens, comments = tokenize(source)
    reader = _Reader(source, tokens)
    tree = reader.parse_tree()
    build = TreeBuilder(source, tuple(comments))
    file = build.transform(tree)
    return Parsed(file, sorted_distinct_diagnostics(reader.diagnostics + build.diagnostics))


@dataclass
class _Mark:
    """The parser's stacks just before token `at`, every reduction done."""

    at: int
    states: list
    values: list


@dataclass
class _Reader:
    source: Source
    tokens: list
    diagnostics: list[Diagnostic] = field(default_factory=list)
    statement: _Mark | None = None
    item: _Mark | None = None  # in an open block, its last item
    block: int | None = None  # index of the open `{`
    depth: int = 0  # of parentheses, brackets, and braces that hold a value
    blamed: bool = False  # this item has its diagnostic
    dropped: tuple | None = None  # statement and message of the last token dropped
    repaired: int | None = -1  # start of what was last repaired, and how often it was
    repairs: int = 0

    def __post_init__(self):
        from .lexer import load_or_build_parser, terminal_by_keyword

        self.parser = load_or_build_parser().parse_interactive()
        self.words = terminal_by_keyword()

    def parse_tree(self) -> "Tree":
        """Lark's tree of all that is grammatical."""
        at, last = self.feed_header(), len(self.tokens) - 1
        while at < last:
            if len(self.diagnostics) >= MAX_ITEMS:
                self.stop_after_many_mistakes(at)
                break
            at = self.feed_token_or_recover(at)
        if self.block is not None or not self.is_between_items():
            self.report_and_recover(last)
        return self.parser.feed_token(self.tokens[last])

    # Feeding

    def feed_header(self) -> int:
        """Feed `effspec 1`, written or not; the index of the token after it."""
        first, second = self.tokens[0], self.tokens[min(1, len(self.tokens) - 1)]
        used = 2
        if first != "effspec":
            empty = first.type == "$END"
            self.report_once_per_item(
                missing_edition(
                    "the file has no statements" if empty else f"the file does not start with `effspec {EDITION}`",
                    self.span(first),
                    help=f"`effspec {EDITION}` is the first line of every recipe",
                    fix=self.insertion_fix(int(self.source.text.startswith("\ufeff")), f"effspec {EDITION}\n"),
                )
            )
            used = 0
        elif (
            second.line == first.line and second.type not in ("NUMBER", "LONG_STRING", "$END") and (second not in HEADS)
        ):
            while self.tokens[used].line == first.line and self.tokens[used].type not in ("LONG_STRING", "$END"):
                used += 1
            self.report_once_per_item(
                unknown_edition(
                    f"`{second}` is no edition of the language",
                    self.span(second),
                    help=f"write `effspec {EDITION}`",
                    fix=Fix(self.span(second), str(EDITION)),
                )
            )
        elif second.type != "NUMBER" or second.line != first.line:
            self.report_once_per_item(
                missing_edition(
                    "the edition of the language is missing",
                    self.span(first),
                    help=f"write `effspec {EDITION}`",
                    fix=self.insertion_fix(first.end_pos, f" {EDITION}"),
                )
            )
            used = 1
        elif second != str(EDITION):
            self.report_once_per_item(
                unknown_edition(
                    f"this effc reads edition {EDITION} of the language, not {second}",
                    self.span(second),
                    help=f"write `effspec {EDITION}`, or use a newer effc",
                )
            )
        self.feed_missing_token("EFFSPEC", "effspec", 0)
        self.feed_missing_token("NUMBER", str(EDITION), self.tokens[used].start_pos)
        return used

    def feed_token_or_recover(self, token_index: int) -> int:
        """Feed one token, or recover; the index to go on with."""
        from lark import Token, UnexpectedToken

        token = self.tokens[token_index]
        kind = self.terminal_of_token(token)
        opens, in_value = self.statement_or_item_started(kind), self.depth > 0 or "LSQB" in self.parser.choices()
        if self.depth > DEPTH or kind not in self.parser.choices() or self.is_python_constant(token_index, kind):
            return self.report_and_recover(token_index)
        try:
            self.parser.feed_token(Token.new_borrow_pos(kind, token, token))
        except UnexpectedToken:
            return self.report_and_recover(token_index)
        if opens:
            self.save_parser_stacks(token_index, opens)
        if kind in ("LPAR", "LSQB") or (kind == "LBRACE" and in_value):
            self.depth += 1
        elif kind in ("RPAR", "RSQB") or (kind == "RBRACE" and in_value):
            self.depth -= 1
        elif kind == "LBRACE":
            self.block, self.item = token_index, None
        elif kind == "RBRACE":
            self.block = None
        return token_index + 1

    def terminal_of_token(self, token) -> str:
        """The terminal that a token is here: words are keywords only where the grammar wants one."""
        kind = self.words.get(token, token.type) if token.type == "NAME" else token.type
        if kind == token.type:
            return kind
        inside = self.block is not None or self.depth > 0
        if (inside and token in HEADS) or (token == "on" and self.statement_keyword() != "expect"):
            return "NAME"
        return kind if kind in self.parser.choices() else "NAME"

    def statement_keyword(self) -> str:
        """The keyword of the statement being read."""
        return str(self.tokens[self.statement.at]) if self.statement else ""

    def is_python_constant(self, token_index: int, kind: str) -> bool:
        """Whether a name in the place of a value is Python's word for one."""
        return (
            kind == "NAME"
            and self.tokens[token_index] in ("True", "False", "None")
            and "NUMBER" in self.parser.choices()
            and self.tokens[token_index + 1].type not in ("COLON", "EQUAL", "LPAR")
        )

    def statement_or_item_started(self, kind: str) -> str:
        if kind in HEAD_TERMINALS:
            return "statement"
        between = self.block is not None and self.depth == 0 and "RBRACE" in self.parser.choices()
        return "item" if between and kind in ("NAME", "DOTTED") else ""

    def save_parser_stacks(self, token_index: int, level: str) -> None:
        """Remember the stacks below the token just shifted."""
        state = self.parser.parser_state
        mark = _Mark(token_index, state.state_stack[:-1], state.value_stack[:-1])
        self.blamed = False
        if level == "item":
            self.item = mark
        else:
            self.statement, self.item = mark, None

    def feed_missing_token(self, kind: str, text: str, offset: int) -> None:
        """Feed a token that is not in the text."""
        from lark import Token

        self.parser.feed_token(Token(kind, text, offset, end_pos=offset))

    # Recovering

    def is_between_items(self) -> bool:
        """Whether the parser stands between two statements, or between two items of a block."""
        return self.depth == 0 and ("RBRACE" if self.block is not None else "$END") in self.parser.accepts()

    def report_and_recover(self, token_index: int) -> int:
        """Say what is wrong at a token; go on with what was meant, or at the next item or statement."""
        from .syntax_errors import ErrorSite, diagnose_syntax_mistake

        complete = self.is_between_items()
        item = self.item if self.block is not None else self.statement
        start = token_index if complete or item is None else item.at
        site = ErrorSite(
            self.source,
            self.tokens,
            self.depth > DEPTH,
            frozenset(self.parser.accepts()),
            start,
            token_index,
            self.block,
            self.statement.at if self.statement else None,
        )
        mistake = diagnose_syntax_mistake(site)
        is_repeat = mistake.drops and self.dropped == (site.statement, mistake.diagnostic.message)
        if complete and not mistake.put:
            self.blamed = is_repeat
        self.dropped = (site.statement, mistake.diagnostic.message) if mistake.drops else None
        self.report_once_per_item(mistake.diagnostic, mistake.repairs)
        repaired = site.statement if mistake.drops else start
        self.repairs = self.repairs + 1 if repaired == self.repaired else 1
        self.repaired = repaired
        if not mistake.repairs or self.repairs > REPAIRS:
            return self.skip_broken_item(site, complete)
        if mistake.put:
            self.feed_missing_token(*mistake.put, self.tokens[token_index].start_pos)
        return token_index + 1 if mistake.skip else token_index

    def skip_broken_item(self, site, complete: bool) -> int:
        """Drop a broken item; the index of the token that reading goes on with."""
        mark = self.item if self.block is not None else self.statement
        if not complete and mark is not None:
            self.restore(mark)
        self.depth = 0
        first = site.at if site.begins_statement(site.at) else max(site.at, site.start + 1)
        if self.block is None:
            return site.next_statement_index(first)
        at = site.next_item_or_end_index(first)
        if site.is_last_or_before_statement(at):
            self.feed_missing_token("RBRACE", "}", self.tokens[at - 1].end_pos)
            self.block = None
        return at

    def stop_after_many_mistakes(self, token_index: int) -> None:
        self.diagnostics.append(
            more_mistakes(f"only the first {MAX_ITEMS} mistakes are shown", self.span(self.tokens[token_index]))
        )
        mark = self.statement
        if mark is not None and not (self.block is None and self.is_between_items()):
            self.restore(mark)
        self.block, self.depth = None, 0

    def restore(self, mark: _Mark) -> None:
        state = self.parser.parser_state
        state.state_stack[:], state.value_stack[:] = mark.states, mark.values

    # Reporting

    def report_once_per_item(self, diagnostic: Diagnostic, joins_fix: bool = False) -> None:
        """Add a diagnostic, one per item; further slips of an item that are repaired add their fix to it."""
        if not self.blamed:
            self.diagnostics.append(diagnostic)
            self.blamed = True
        elif joins_fix and diagnostic.fix and self.diagnostics[-1].fix:
            self.diagnostics[-1] = _merge_fixes_into_first(self.diagnostics[-1], diagnostic)

    def span(self, token) -> Span:
        end = token.start_pos + len(token.split("\n")[0])
        return Span(self.source, token.start_pos, end)

    def insertion_fix(self, offset: int, text: str) -> Fix:
        return Fix(Span(self.source, offset, offset), text)


def _merge_fixes_into_first(first: Diagnostic, second: Diagnostic) -> Diagnostic:
    """The first, mended together with the second."""
    between = first.span.source.text[first.fix.span.end : second.fix.span.start]
    fix = Fix(first.fix.span.to(second.fix.span), first.fix.text + between + second.fix.text)
    related = ((second.span, second.message),) if second.span else ()
    return replace(first, fix=fix, related=(*first.related, *related))

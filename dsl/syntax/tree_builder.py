"""From Lark's tree to the syntax tree. Rule `arg` of grammar.lark becomes `TreeBuilder.arg`, and so on."""

import re

from lark import Transformer, v_args

from . import ast
from .control_characters import control_character_error, first_control_character
from .diagnostics import Diagnostic, Fault
from .source import Source, Span

unknown_escape = Fault("unknown-escape", "A backslash in a string is followed by something that has no meaning.")
reserved_word = Fault("reserved-word", "A word of the language is used as a name that other parts could not mention.")
long_number = Fault("long-number", "A number has more digits than any quantity needs.")
long_selector = Fault("long-selector", "More parts are joined by `|`, `-` and `&` than one expression may have.")

DIGITS = 40  # of a number
PARTS = 200  # joined by set operators in one expression
_UNSEEN = "\N{REPLACEMENT CHARACTER}"
ESCAPES = {"\\": "\\", '"': '"', "n": "\n", "r": "\r", "t": "\t"}
RESERVED = {"true", "false", "in", "on", "of", "as", "allow", "empty"}

# Nodes that take the parts of their rule in order, by the rule's name; of some the number of parts before those that
# it takes as one tuple.
_PLAIN = (
    *(
        ast.Param,
        ast.Profile,
        ast.Matrix,
        ast.Entry,
        ast.Pipeline,
        ast.Step,
        ast.Expect,
        ast.Bound,
        ast.Limit,
        ast.Emit,
    ),
    *(ast.AllowEmpty, ast.Of, ast.Interval, ast.Call, ast.Items, ast.Pairs),
)
NODES: dict[str, type] = {re.sub(r"(?<!^)(?=[A-Z])", "_", node.__name__).lower(): node for node in _PLAIN}
BEFORE_LIST = {"matrix": 0, "items": 0, "pairs": 0, "profile": 1, "expect": 1, "emit": 1, "call": 1, "pipeline": 3}
DEFINING = {"param", "profile", "pipeline", "step"}  # their first part is a name that is defined here

_escape = re.compile(r"\\(u[0-9a-fA-F]{4}|.)|\r\n", re.DOTALL)
_number = re.compile(r"(-?[0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)(.*)")


@v_args(meta=True)
class TreeBuilder(Transformer):
    """Builds `ast.File`; what is wrong inside a token is gathered in `diagnostics`."""

    def __init__(self, source: Source, comments: tuple[ast.Comment, ...]):
        super().__init__(visit_tokens=False)
        self.source = source
        self.comments = comments
        self.diagnostics: list[Diagnostic] = []

    def span(self, meta) -> Span:
        return Span(self.source, meta.start_pos, meta.end_pos)

    def start(self, meta, children) -> ast.File:
        number, doc, *statements = children
        return ast.File(self.source, int(number.value), doc, tuple(statements), self.comments)

    def __default__(self, data, children, meta):
        """The node of a rule of `NODES`; other rules have a method."""
        if data in DEFINING:
            self.report_reserved_name(children[0])
        if data in BEFORE_LIST:
            count = BEFORE_LIST[data]
            children = [*children[:count], tuple(part for part in children[count:] if part is not None)]
        return NODES[data](*children, span=self.span(meta))

    # Declarations

    def use(self, meta, children) -> ast.Use:
        return ast.Use(children[0], children[1] and self.report_reserved_name(children[1]), span=self.span(meta))

    def model(self, meta, children) -> ast.Declare:
        return ast.Declare("model", self.report_reserved_name(children[0]), children[1], span=self.span(meta))

    def data(self, meta, children) -> ast.Declare:
        return ast.Declare("data", self.report_reserved_name(children[0]), children[1], span=self.span(meta))

    # Values

    def op(self, meta, children) -> str:
        return str(children[0])

    def joined(self, meta, children):
        left = children[0]
        if len(children) > 2 * PARTS:
            self.diagnostics.append(
                long_selector(
                    f"{len(children) // 2 + 1} parts are joined here; an expression has at most {PARTS}",
                    self.span(meta),
                    help="use `*` and `{a,b}` in the patterns, or several steps",
                )
            )
            return left
        for op, right in zip(children[1::2], children[2::2], strict=True):
            left = ast.Combine(str(op), left, right, span=Span(self.source, meta.start_pos, right.span.end))
        return left

    def arg(self, meta, children) -> ast.Arg:
        name, value = children
        return ast.Arg(name.path if name else "", value, span=self.span(meta), name_span=name and name.span)

    def number(self, meta, children) -> ast.Number:
        span = self.span(meta)
        digits, unit = _number.fullmatch(children[0]).groups()
        if len(digits) > DIGITS:
            self.diagnostics.append(
                long_number(f"this number has {len(digits)} characters; the most is {DIGITS}", span)
            )
            digits = "0"
        return ast.Number(digits, unit, span=span)

    def bool(self, meta, children) -> ast.Bool:
        return ast.Bool(children[0] == "true", span=self.span(meta))

    def name(self, meta, children) -> ast.Name:
        return ast.Name(str(children[0]), span=self.span(meta))

    word = name

    def report_reserved_name(self, name: ast.Name) -> ast.Name:
        """A name that is defined here, so that others can mention it."""
        if name.path in RESERVED:
            self.diagnostics.append(
                reserved_word(
                    f"`{name.path}` is a word of the language, not a name",
                    name.span,
                    help=f"call it `{name.path}_` or better",
                )
            )
        return name

    def text(self, meta, children) -> ast.Text:
        token, span = str(children[0]), self.span(meta)
        quotes = 3 if token.startswith('"""') else 1
        unknown = []

        def plain(match) -> str:
            code = match[1]
            if code is None:
                return "\n"
            if code[0] == "u" and len(code) == 5 and not 0xD800 <= int(code[1:], 16) <= 0xDFFF:
                return chr(int(code[1:], 16))
            if code not in ESCAPES:
                start = span.start + quotes + match.start()
                unknown.append((code, Span(self.source, start, start + len(match[0]))))
            return ESCAPES.get(code, code)

        value = _escape.sub(plain, token[quotes:-quotes])
        if unknown:
            self.report_unknown_escapes(unknown)
        if character := first_control_character(value, allow_line_breaks=True):
            self.diagnostics.append(control_character_error("the text", character, span))
            value = "".join(
                _UNSEEN if first_control_character(c, allow_line_breaks=True) else c for c in value
            )  # reported once
        return ast.Text(value, span=span)

    def report_unknown_escapes(self, escapes: list[tuple[str, Span]]) -> None:
        """Report the unknown escapes of a string in one diagnostic."""
        (code, span), *further = escapes
        escape = "a backslash before a line end" if code in "\r\n" else f"`\\{code}`"
        self.diagnostics.append(
            unknown_escape(
                f"{escape} means nothing in a string",
                span,
                help="write `\\\\` for a backslash; in paths `/` works everywhere",
                related=tuple((where, "nor does this") for _, where in further[:5]),
            )
        )

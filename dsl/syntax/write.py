"""Values of the syntax tree as text on one line."""

import unicodedata

from . import ast

# How tightly a value binds; one that binds less tightly than its place asks for stands in parentheses.
_LOOSE, _JOINED, _SHARE, _RANGE, _ATOM = range(5)
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
# Printable or not, these would be lost, or turn the direction of the text, in an editor.
_HIDDEN = frozenset("\u00ad\u061c\u200b\u200e\u200f\u2028\u2029\ufeff") | {
    chr(c) for c in (*range(0x202A, 0x202F), *range(0x2060, 0x2070))
}


def expression_text(node: ast.Expr, min_precedence: int = _LOOSE) -> str:
    """Text of a value. `min_precedence`: 0 stands alone, 1 joined, 2 beside a join, 3 beside `of`, 4 beside `..`."""
    binding, text = _expression_precedence_and_text(node)
    return f"({text})" if binding < min_precedence else text


def _expression_precedence_and_text(node: ast.Expr) -> tuple[int, str]:
    match node:
        case ast.AllowEmpty():
            return _LOOSE, f"{expression_text(node.selector, _JOINED)} allow empty"
        case ast.Combine():
            return _JOINED, f"{expression_text(node.left, _JOINED)} {node.op} {expression_text(node.right, _SHARE)}"
        case ast.Of():
            return _SHARE, f"{expression_text(node.amount, _RANGE)} of {node.base.path}"
        case ast.Interval():
            return _RANGE, f"{expression_text(node.low, _ATOM)}..{expression_text(node.high, _ATOM)}"
        case ast.Items():
            return _ATOM, "[" + ", ".join(expression_text(item) for item in node.items) + "]"
        case ast.Pairs():
            return _ATOM, "{" + ", ".join(f"{e.name.path}: {expression_text(e.value)}" for e in node.entries) + "}"
        case ast.Call():
            return _ATOM, f"{node.name.path}(" + ", ".join(_argument_text(a) for a in node.args) + ")"
        case ast.Number():
            return _ATOM, node.digits + node.unit
        case ast.Text():
            return _ATOM, quoted(node.value)
        case ast.Bool():
            return _ATOM, "true" if node.value else "false"
        case ast.Name():
            return _ATOM, node.path
    raise AssertionError(f"no value: {type(node).__name__}")


def _argument_text(arg: ast.Arg) -> str:
    return (f"{arg.name}: " if arg.name else "") + expression_text(arg.value)


def quoted(value: str, multiline: bool = False) -> str:
    """A string in quotes. `multiline`: in three quotes, its lines as they are."""
    if not multiline:
        return '"' + "".join(_ESCAPES.get(c) or _escaped_if_control(c) for c in value) + '"'
    body, quotes = [], 0
    for i, c in enumerate(value):
        quotes = quotes + 1 if c == '"' else 0
        if c == "\\" or (c == '"' and (quotes == 3 or i == len(value) - 1)):
            body.append("\\" + c)
            quotes = 0
        else:
            body.append(c if c in "\n\t" else "\\r" if c == "\r" else _escaped_if_control(c))
    return '"""' + "".join(body) + '"""'


def _escaped_if_control(c: str) -> str:
    hidden = c in _HIDDEN or unicodedata.category(c) == "Cc"
    return f"\\u{ord(c):04x}" if hidden else c


def display_width(line: str) -> int:
    """Columns that a line takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)

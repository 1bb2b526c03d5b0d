"""The syntax tree to its one canonical text.

Two spaces of indent, a call or list on one line where it fits in 100 columns and else an argument per line
with a trailing comma, one blank line between groups of statements, nothing aligned, and every comment kept:
on its line, or before the statement, step or argument it belongs to.
"""

from bisect import bisect_left

from . import ast
from .diagnostics import Reject
from .source import Source
from .write import display_width, expression_text, quoted

COLUMNS = 100
INDENT = "  "
BLOCKS = (ast.Pipeline, ast.Expect, ast.Emit)


def format_file(file: ast.File) -> str:
    """Canonical text of a file read without errors, or of one made by a program."""
    return _Writer(file).formatted_text()


def format_source(source: Source) -> str:
    """Format source text. Raises Reject where it has syntax errors: a formatter must not guess."""
    from .parse import parse

    parsed = parse(source)
    if any(d.severity == "error" for d in parsed.diagnostics):
        raise Reject(*parsed.diagnostics)
    return format_file(parsed.file)


class _Writer:
    """Writes nodes in order and, between them, the comments that stand before what comes next."""

    def __init__(self, file: ast.File):
        self.file = file
        self.source = file.source
        self.comments = sorted(file.comments, key=lambda c: c.span.start)
        self.starts = [c.span.start for c in self.comments]
        self.next = 0  # index of the first comment not yet written
        self.lines: list[str] = []
        self.end: int | None = None  # offset where what was last written ends, None after an opening brace

    def formatted_text(self) -> str:
        file, first = self.file, self._offset_of_edition()
        self.write_comments_before(first, "")
        self.keep_blank_line_before(first)
        self.write_lines_with_comment("", f"effspec {file.edition}", self._end_offset_of_edition(first))
        if file.doc:
            self.write_comments_before(file.doc.span.start, "")
            self.write_lines_with_comment("", quoted(file.doc.value, multiline=True), file.doc.span.end)
        previous = None
        for statement in file.statements:
            self.write_separator(statement, previous is None or _needs_blank_line_between(previous, statement), "")
            self.write_statement(statement)
            previous = statement
        if self._has_comments() and file.statements == ():
            self.append_blank_line()
        self.write_comments_before(len(self.source.text) + 1, "")
        return "\n".join(self.lines) + "\n"

    def _offset_of_edition(self) -> int:
        """Offset of `effspec`."""
        text, at = self.source.text, 0
        while True:
            at = text.find("effspec", at)
            covering = next((c.span for c in self.comments if c.span.start <= at < c.span.end), None)
            if at < 0 or covering is None:
                return max(at, 0)
            at = covering.end

    def _end_offset_of_edition(self, start: int) -> int:
        return self.source.text.find(str(self.file.edition), start) + 1 if self.source.text else 0

    # Lines, comments and blank lines

    def write_lines_with_comment(self, indent: str, text: str, source_end: int | None) -> None:
        """Write lines, with the comment that stands behind them on the line where their source ends."""
        self.lines += (indent + text).split("\n")
        self.end = source_end
        if (
            self._has_comments()
            and source_end is not None
            and self._is_trailing_comment(self.comments[self.next], source_end)
        ):
            self.lines[-1] += "  " + _comment_text(self.comments[self.next])
            self.end = self.comments[self.next].span.end
            self.next += 1

    def _has_comments(self) -> bool:
        return self.next < len(self.comments)

    def _is_trailing_comment(self, comment: ast.Comment, end: int) -> bool:
        between = self.source.text[end : comment.span.start]
        return not comment.own_line and comment.span.start >= end and between.strip(" \t,") == ""

    def write_comments_before(self, offset: int, indent: str) -> None:
        """Write the comments before an offset, each on its own line."""
        while self._has_comments() and self.comments[self.next].span.start < offset:
            comment = self.comments[self.next]
            self.next += 1
            self.keep_blank_line_before(comment.span.start)
            self.lines.append(indent + _comment_text(comment))
            self.end = comment.span.end

    def keep_blank_line_before(self, start: int) -> None:
        """Keep a blank line that the source has before an offset."""
        if self.end is not None and self.source.text[self.end : start].count("\n") > 1:
            self.append_blank_line()

    def append_blank_line(self) -> None:
        if self.lines and self.lines[-1]:
            self.lines.append("")

    def write_separator(self, node, blank_line: bool, indent: str) -> None:
        """Comments between the last node and this one, and a blank line where there is or must be one."""
        start = len(self.lines)
        self.write_comments_before(self.end_offset_of_leading_comments(node), indent)
        self.keep_blank_line_before(node.span.start)
        if blank_line and "" not in self.lines[start:]:
            self.lines.insert(start, "")

    def end_offset_of_leading_comments(self, node) -> int:
        """Offset up to which the comments inside a node have no better place than before it."""
        match node:
            case ast.Declare() | ast.Step():
                return self.end_offset_of_leading_comments(node.call)
            case ast.Arg() | ast.Entry():
                return self.end_offset_of_leading_comments(node.value)
            case ast.Call():
                return node.name.span.end if node.args or self.has_comment_inside(node) else node.span.end
            case ast.Items() | ast.Pairs():
                return node.span.start
            case ast.Pipeline():
                return self._offset_of_brace(node.model.span.end)
            case ast.Profile():
                return self._offset_of_brace(node.name.span.end)
            case ast.Matrix():
                return (
                    node.span.start
                    if self._needs_braces(node)
                    else self.end_offset_of_leading_comments(node.entries[0])
                )
            case ast.Expect() | ast.Emit():
                return self._offset_of_brace(node.pipeline.span.end)
        return node.span.end

    def _offset_of_brace(self, start: int) -> int:
        """Offset of the `{` after an offset, comments skipped."""
        text, at = self.source.text, start
        while 0 <= at < len(text) and text[at] != "{":
            at = text.find("\n", at) if text[at] == "#" else at + 1
        return max(at, 0)

    def _needs_braces(self, matrix: ast.Matrix) -> bool:
        return len(matrix.entries) != 1

    def has_comment_inside(self, node) -> bool:
        """Whether a comment not yet written lies in a node."""
        i = bisect_left(self.starts, node.span.start, lo=self.next)
        return i < len(self.starts) and self.starts[i] < node.span.end

    # Nodes

    def write_statement(self, node: ast.Statement) -> None:
        match node:
            case ast.Use():
                alias = f" as {node.alias.path}" if node.alias else ""
                self.write_lines_with_comment("", f"use {expression_text(node.target)}{alias}", node.span.end)
            case ast.Param():
                bounds = f" in {expression_text(node.bounds)}" if node.bounds else ""
                doc = f" {quoted(node.doc.value)}" if node.doc else ""
                head = f"param {node.name.path}: {node.type.path} = "
                self.write_lines_with_comment("", head + expression_text(node.default, 3) + bounds + doc, node.span.end)
            case ast.Declare():
                self.write_value("", f"{node.kind} {node.name.path} = ", node.call, "", node.span.end)
            case ast.Profile():
                self.write_entries(node, f"profile {node.name.path} ", node.entries)
            case ast.Matrix():
                self.write_matrix(node)
            case ast.Pipeline():
                self.write_block(node, f"pipeline {node.name.path}({node.model.path}) ", node.steps, node.doc)
            case ast.Expect():
                self.write_block(node, f"expect {node.pipeline.path} ", node.bounds)
            case ast.Emit():
                self.write_block(node, f"emit {node.pipeline.path} ", node.targets)

    def write_matrix(self, node: ast.Matrix) -> None:
        if self._needs_braces(node):
            self.write_entries(node, "matrix ", node.entries)
        else:
            entry = node.entries[0]
            self.write_value("", f"matrix {entry.name.path}: ", entry.value, "", node.span.end)

    def write_entries(self, node, head: str, entries) -> None:
        """A profile or matrix: on one line where it fits."""
        line = head + "{ " + "  ".join(f"{e.name.path}: {expression_text(e.value)}" for e in entries) + " }"
        if entries and not self.has_comment_inside(node) and display_width(line) <= COLUMNS:
            self.write_lines_with_comment("", line, node.span.end)
        else:
            self.write_block(node, head, entries)

    def write_block(self, node, head: str, items, doc: ast.Text | None = None) -> None:
        if not items and not doc and not self.has_comment_inside(node):
            self.write_lines_with_comment("", head + "{}", node.span.end)
            return
        self.write_lines_with_comment(
            "", head + "{", self.end_offset_of_leading_comments(node) + 1 if self.source.text else None
        )
        opened = len(self.lines)
        if doc:
            self.write_comments_before(doc.span.start, INDENT)
            self.write_lines_with_comment(INDENT, quoted(doc.value, multiline=True), doc.span.end)
        for item in items:
            self.write_separator(item, False, INDENT)
            self.write_block_item(item)
        self.write_comments_before(node.span.end, INDENT)
        if self.lines[opened : opened + 1] == [""]:
            del self.lines[opened]
        self.write_lines_with_comment("", "}", node.span.end)

    def write_block_item(self, item: ast.Step | ast.Entry | ast.Bound | ast.Call) -> None:
        match item:
            case ast.Step():
                self.write_value(INDENT, f"{item.name.path} = ", item.call, "", item.span.end)
            case ast.Entry():
                self.write_value(INDENT, f"{item.name.path}: ", item.value, "", item.span.end)
            case ast.Bound():
                self.write_lines_with_comment(INDENT, bound_text_of_node(item), item.span.end)
            case ast.Call():
                self.write_value(INDENT, "", item, "", item.span.end)

    def write_value(self, indent: str, head: str, value: ast.Expr, tail: str, end: int) -> None:
        """A value after `head`: on one line, or its arguments, items or shares one per line."""
        line = head + expression_text(value) + tail
        if not isinstance(value, ast.Call | ast.Items | ast.Pairs) or not (
            self.has_comment_inside(value) or (display_width(indent + line) > COLUMNS and _bracketed_parts(value))
        ):
            self.write_lines_with_comment(indent, line, end)
            return
        opener, after, closer = _opening_text_and_closing_bracket(value)
        self.write_lines_with_comment(
            indent, head + opener, self.source.text.find(opener[-1], after) + 1 if self.source.text else None
        )
        for part in _bracketed_parts(value):
            self.write_separator(part, False, indent + INDENT)
            label, inner = _label_and_value(part)
            self.write_value(indent + INDENT, label, inner, ",", part.span.end)
        self.write_comments_before(value.span.end, indent + INDENT)
        self.write_lines_with_comment(indent, closer + tail, end)


def bound_text_of_node(node: ast.Bound) -> str:
    limit, on = node.limit, f" on {node.profile.path}" if node.profile else ""
    times = f" * {limit.baseline.path}" if limit.baseline else ""
    part = f" in {node.part.path}" if node.part else ""
    sure = f" with {expression_text(node.confidence)} confidence" if node.confidence else ""
    return f"{expression_text(node.metric)} {node.op} {expression_text(limit.amount)}{times}{part}{on}{sure}"


def _bracketed_parts(value: ast.Call | ast.Items | ast.Pairs) -> tuple:
    match value:
        case ast.Call():
            return value.args
        case ast.Items():
            return value.items
    return value.entries


def _opening_text_and_closing_bracket(value: ast.Call | ast.Items | ast.Pairs) -> tuple[str, int, str]:
    """Text before the parts, an offset before its bracket, and the closing bracket."""
    match value:
        case ast.Call():
            return value.name.path + "(", value.name.span.end, ")"
        case ast.Items():
            return "[", value.span.start, "]"
    return "{", value.span.start, "}"


def _label_and_value(node: ast.Arg | ast.Entry | ast.Expr) -> tuple[str, ast.Expr]:
    """Label of a part, and its value."""
    match node:
        case ast.Arg():
            return f"{node.name}: " if node.name else "", node.value
        case ast.Entry():
            return f"{node.name.path}: ", node.value
    return "", node


def _comment_text(comment: ast.Comment) -> str:
    return f"# {comment.text}" if comment.text else "#"


def _statement_group(node: ast.Statement) -> str:
    return {"Use": "use", "Param": "param", "Declare": "declare", "Profile": "profile", "Matrix": "matrix"}.get(
        type(node).__name__, "block"
    )


def _needs_blank_line_between(before: ast.Statement, after: ast.Statement) -> bool:
    return (
        isinstance(before, BLOCKS) or isinstance(after, BLOCKS) or _statement_group(before) != _statement_group(after)
    )

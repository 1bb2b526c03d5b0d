"""What is read of a recipe, and what is said of one that is broken."""

import os

import lark
import pytest
from effc.dsl.syntax import ast
from effc.dsl.syntax.diagnostics import Reject
from effc.dsl.syntax.edition import DEPTH
from effc.dsl.syntax.lexer import load_or_build_parser
from effc.dsl.syntax.parse import MAX_ITEMS, parse
from effc.dsl.syntax.render import apply_fixes
from effc.dsl.syntax.source import Source
from effc.dsl.syntax.source_file import LIMIT, read_source

from tests.clock import own_time
from tests.grids import wide

HEAD = "effspec 1\n"


def read(text: str) -> ast.File:
    parsed = parse(Source("a.effspec", HEAD + text))
    assert not parsed.diagnostics, parsed.diagnostics
    return parsed.file


def only(text: str) -> ast.Statement:
    (statement,) = read(text).statements
    return statement


def value(text: str) -> ast.Expr:
    return only(f"model x = f({text})").call.args[0].value


def said(text: str) -> list[str]:
    return [f"{d.span.line}:{d.span.column} {d.slug}" for d in parse(Source("a.effspec", text)).diagnostics]


# Reading


def test_statements_are_read_whole():
    assert only("use std.text as t") == ast.Use(name("std.text"), name("t"), span=NOWHERE)
    assert only('use "./a.effspec"').target.value == "./a.effspec"
    param = only('param keep: ratio = 85% in 60%..100% "share"')
    assert (param.type.path, param.bounds.high.digits, param.doc.value) == ("ratio", "100", "share")
    assert len(only("param k: int = 8 in [8, 16,]").bounds.items) == 2
    assert [e.name.path for e in only("profile z { isa: a  threads: 2 }").entries] == ["isa", "threads"]
    assert only("matrix keep: [80%, 85%]") == only("matrix { keep: [80%, 85%] }")
    pipeline = only('pipeline p(base) { """doc""" a = x.y(1, on: "q", from: b,) b = z() }')
    assert (pipeline.doc.value, [s.name.path for s in pipeline.steps]) == ("doc", ["a", "b"])
    assert [a.name for a in pipeline.steps[0].call.args] == ["", "on", "from"]
    assert [t.name.path for t in only('emit p { hf("hf") native("cpu") }').targets] == ["hf", "native"]


def test_bounds_have_factors_ranges_and_profiles():
    first, second, third = only("expect p { q(h) <= 1.15 * base on zen4 params in 0.8B..1.0B d.p50 < 30ms }").bounds
    assert (first.op, first.limit.baseline.path, first.profile.path) == ("<=", "base", "zen4")
    assert (second.op, second.limit.amount.low.unit) == ("in", "B")
    assert (third.metric.path, third.limit.baseline) == ("d.p50", None)


def test_a_bound_with_a_confidence_ends_there():
    first, second = only("expect p { q(h) <= 1.02 * base in native on zen4 with 95% confidence  with(h) <= 2 }").bounds
    assert (first.part.path, first.profile.path, first.confidence.digits) == ("native", "zen4", "95")
    assert (second.metric.name.path, second.confidence) == ("with", None)


def test_keywords_are_names_where_no_keyword_can_stand():
    pipeline = only("pipeline model(data) { use = expect.emit(data: param, model: profile) matrix = a() }")
    assert [s.name.path for s in pipeline.steps] == ["use", "matrix"]
    assert [e.name.path for e in only("profile p { isa: x  model: y  on: 1 }").entries] == ["isa", "model", "on"]


@pytest.mark.parametrize(
    "text, digits, unit, number",
    [
        ("85%", "85", "%", 85),
        ("24GiB", "24", "GiB", 24),
        ("0.8B", "0.8", "B", 0.8),
        ("3e-4", "3e-4", "", 3e-4),
        ("-1", "-1", "", -1),
        ("1_000ms", "1_000", "ms", 1000),
    ],
)
def test_numbers_keep_digits_and_unit(text, digits, unit, number):
    read = value(text)
    assert (read.digits, read.unit, read.value) == (digits, unit, number)


def test_values_bind_from_range_to_allow_empty():
    assert value("1..2 of x") == value("(1..2) of x") != value("1..(2 of x)")
    assert value('"a" | "b" - "c"') == value('("a" | "b") - "c"') != value('"a" | ("b" - "c")')
    assert value('"a" | "b" allow empty') == value('("a" | "b") allow empty')
    assert value("[keep of channels, true, f(x)]").items[0].base.path == "channels"


def test_shares_stand_where_a_value_does():
    shares = value("{blocks: 44, channels: share, model: 4%,}")
    assert [(e.name.path, e.value.span.text) for e in shares.entries] == [
        ("blocks", "44"),
        ("channels", "share"),
        ("model", "4%"),
    ]
    assert value("{}").entries == () and value("[{a: 1}, {a: {b: 2}}]").items[1].entries[0].value.entries
    assert only("param s: shares = {\nmodel: 1,\nmatrix: 3\n}").default.entries[1].name.path == "matrix"
    profile, _ = read("profile p { s: {a: 1} t: 2 } matrix { k: [{a: 1}] }").statements
    assert [e.name.path for e in profile.entries] == ["s", "t"]


def test_strings_have_escapes_and_docstrings_lines():
    assert value(r'"a\"b\\c\n\t\u00e9"').value == 'a"b\\c\n\té'
    assert read('"""one\r\n "two" \\"""three"""').doc.value == 'one\n "two" """three'


def test_line_ends_marks_and_tabs_do_not_matter():
    text = 'model a = hf("x")\n\tdata b = text(\n"y")\n'
    for other in (text.replace("\n", "\r\n"), text.replace("\n", " "), text.replace("\n", "\t\n\n")):
        assert read(other) == read(text)
    assert parse(Source("a", "\ufeff" + HEAD + text)).file == read(text)


def test_comments_know_whether_they_stand_alone():
    file = read('# one\nmodel a = hf("#no") # two\n#three')
    assert [(c.text, c.own_line) for c in file.comments] == [("one", True), ("two", False), ("three", True)]


def test_spans_are_exact():
    file = read('pipeline lean(base) {\n  a = x.y(on: ("q"), k: [1, 2])\n}')
    call = file.statements[0].steps[0].call
    assert [arg.span.text for arg in call.args] == ['on: ("q")', "k: [1, 2]"]
    assert (call.span.text, call.name.span.text) == ('x.y(on: ("q"), k: [1, 2])', "x.y")
    assert call.args[1].name_span.text == "k" and file.statements[0].span.text.endswith("}")


def test_the_grammar_stands_alone(tmp_path):
    """Another tool can use the file with plain Lark and its contextual lexer."""
    from pathlib import Path

    import effc.dsl.syntax

    text = Path(effc.dsl.syntax.__file__).with_name("grammar.lark").read_text()
    tour = Path(__file__).with_name("tour.effspec").read_text()
    other = lark.Lark(text, parser="lalr", lexer="contextual", propagate_positions=True, maybe_placeholders=True)
    assert other.parse(tour).data == "start"
    assert len(other.terminals) == len(load_or_build_parser().terminals)


# Mistakes: the place, the kind, and what is still read

SLIPS = {
    "nothing": ("", "1:1 missing-edition"),
    "no edition": ('model base = hf("x")', "1:1 missing-edition"),
    "an edition without number": ('effspec\nmodel base = hf("x")', "1:1 missing-edition"),
    "the first word alone": ("effspec", "1:1 missing-edition"),
    "the first word and a space": ("effspec ", "1:1 missing-edition"),
    "another edition": ("effspec 2\n", "1:9 unknown-edition"),
    "no edition at all": ("effspec one\n", "1:9 unknown-edition"),
    "equal sign in an argument": (HEAD + "pipeline p(b) { a = x(k=1, l=2) }", "2:24 wrong-sign"),
    "equal sign in an entry": (HEAD + "profile p { isa = x  t == 3 }", "2:17 wrong-sign", "2:24 wrong-sign"),
    "colon in a step": (HEAD + "pipeline p(b) {\n a: x(k: 1) }", "3:3 wrong-sign"),
    "equal sign in a bound": (HEAD + "expect p { q = 3 }", "2:14 wrong-sign"),
    "no comma": (HEAD + "pipeline p(b) { a = x(k: 1 l: [1 2]) }", "2:28 missing-comma"),
    "needless commas": (HEAD + "profile p { a: 1, b: 2, c: 3 }", "2:17 wrong-sign"),
    "a unit apart": (HEAD + "profile p { m: 24 GiB }", "2:16 wrong-sign"),
    "a percent sign apart": (HEAD + "param p: ratio = 85 %", "2:18 wrong-sign"),
    "no type": (HEAD + "param keep = 85%", "2:7 syntax"),
    "an open call": (HEAD + "pipeline p(b) {\n  a = x(k: 1\n  c = y(k: 1)\n}", "4:3 not-closed"),
    "an open list": (HEAD + "pipeline p(b) {\n  a = x(k: [1, 2)\n  c = y(k: 1)\n}", "3:17 not-closed"),
    "an open block": (HEAD + "pipeline p(b) {\n  a = x(k: 1)\n\nexpect p { q <= 3 }", "5:1 not-closed"),
    "an open file": (HEAD + "pipeline p(b) {\n  a = x(k: 1)\n", "3:14 not-closed"),
    "a closer too many": (HEAD + "pipeline p(b) { a = x(k: 1)) }\n}", "2:28 not-opened", "3:1 not-opened"),
    "an open string": (HEAD + 'model a = hf("x)\nmodel b = hf("y")', "2:14 unterminated-string"),
    "an open docstring": (HEAD + '"""doc\nmore\nmodel b = hf("y")', "2:1 unterminated-string"),
    "single quotes": (HEAD + "model a = hf('x')", "2:14 foreign-spelling"),
    "Python's words": (
        HEAD + "model a = hf(x: True)\nmodel b = hf(y: None)",
        "2:17 foreign-spelling",
        "3:17 foreign-spelling",
    ),
    "semicolons": (HEAD + 'model a = hf("x");\nmodel b = hf("y");', "2:18 foreign-spelling", "3:18 foreign-spelling"),
    "another comment": (HEAD + '// so\nmodel a = hf("x")', "2:1 foreign-spelling"),
    "YAML": (HEAD + 'model:\n  name: x\ndata a = text("x")', "2:6 syntax"),
    "a mistyped keyword": (HEAD + 'modle a = hf("x")', "2:1 syntax"),
    "a step outside": (HEAD + "a = prune.blocks(remove: 4)", "2:1 syntax"),
    "a pattern without quotes": (HEAD + "pipeline p(b) { a = x(on: *.mlp) }", "2:27 missing-quotes"),
    "open shares": (HEAD + "pipeline p(b) {\n  a = x(k: {i: 1, on: y(b))\n  c = y(k: 1)\n}", "3:27 not-closed"),
    "open shares and call": (HEAD + "pipeline p(b) {\n  a = x(k: {i: 1\n  c = y(k: 1)\n}", "4:3 not-closed"),
    "open shares before the last brace": (HEAD + "pipeline p(b) {\n  a = x(k: {i: 1\n}\nuse c.d", "5:1 not-closed"),
    "open shares of a param": (HEAD + "param s: shares = {i: 1\nmodel b = c()", "3:1 not-closed"),
    "open shares in a list": (HEAD + "matrix s: [{i: 1}, {j: 2]\nmodel b = c()", "2:25 not-closed"),
    "shares without a colon": (HEAD + "pipeline p(b) {\n a = x(k: {\n  i 1,\n  j: 2\n })\n c = y()\n}", "4:5 syntax"),
    "shares as in JSON": (HEAD + 'model a = hf(k: {"i": 1, "j": 2})', "2:18 foreign-spelling"),
    "shares without a comma": (HEAD + "model a = hf(k: {i: 1 j: 2})", "2:23 missing-comma"),
    "shares with equal signs": (HEAD + "model a = hf(k: {i = 1, j = 2})", "2:20 wrong-sign"),
    "shares with semicolons": (HEAD + "model a = hf(k: {i: 1; j: 2})", "2:22 foreign-spelling"),
    "shares of numbers": (HEAD + "model a = hf(k: {1: 2})", "2:18 syntax"),
    "alternatives without quotes": (HEAD + "pipeline p(b) {\n a = x(on: {q,k}_proj)\n c = y()\n}", "3:13 syntax"),
    "the factor last": (HEAD + "expect p { q <= base * 1.15 }", "2:24 syntax"),
    "a dot too many": (HEAD + "pipeline p(b) {\n a = prune.\n c = y()\n}", "3:6 syntax"),
    "half a step": (HEAD + "pipeline p(b) {\n a\n c = y()\n}", "3:2 syntax"),
    "half a model": (HEAD + "model a =", "2:10 syntax"),
    "no call": (HEAD + 'model a = "x"\ndata b = text("x")', "2:11 syntax"),
    "letters of other scripts": (HEAD + 'model naïve = hf("x")', "2:9 unknown-character"),
    "a hard space": (HEAD + 'model\u00a0a = hf("x")', "2:6 unknown-character"),
    "a null": (HEAD + 'model a\0 = hf("x")', "2:8 unknown-character"),
    "backslashes": (HEAD + r'model a = hf("C:\data\x")', "2:17 unknown-escape"),
    "a reserved word": (HEAD + 'model true = hf("x")', "2:7 reserved-word"),
    "a long number": (HEAD + "model a = hf(" + "9" * 50 + ")", "2:14 long-number"),
    "a long selector": (HEAD + "model a = hf(" + " | ".join(['"x"'] * 300) + ")", "2:14 long-selector"),
}


@pytest.mark.parametrize("name", SLIPS)
def test_each_mistake_is_told_once_where_it_stands(name):
    text, *expected = SLIPS[name]
    assert said(text) == expected


@pytest.mark.parametrize("name", SLIPS)
def test_what_is_said_is_short_and_plain(name):
    for d in parse(Source("a", SLIPS[name][0])).diagnostics:
        text = f"{d.message} {d.help} {d.note}"
        assert not any(word in text.lower() for word in ("invalid", "failed", "please", "token(", "lark", "$end"))
        assert len(d.message) < 100 and not d.message.endswith(".")


@pytest.mark.parametrize(
    "name",
    [
        "no edition",
        "an edition without number",
        "no edition at all",
        "equal sign in an argument",
        "equal sign in an entry",
        "colon in a step",
        "no comma",
        "needless commas",
        "a unit apart",
        "a percent sign apart",
        "single quotes",
        "semicolons",
        "shares as in JSON",
        "shares without a comma",
        "shares with equal signs",
        "shares with semicolons",
        "a hard space",
    ],
)
def test_fixes_leave_nothing_to_say(name):
    text = SLIPS[name][0]
    assert said(apply_fixes(text, parse(Source("a", text)).diagnostics)) == []


def test_a_broken_step_leaves_the_others():
    text = HEAD + 'pipeline p(b) {\n a = x(1)\n b = y(((\n c = z(1)\n d w(1)\n e = v(1)\n}\nmodel m = hf("x")'
    pipeline, model = parse(Source("a", text)).file.statements
    assert [s.name.path for s in pipeline.steps] == ["a", "c", "e"] and model.name.path == "m"
    assert len(said(text)) == 2


def test_a_step_with_broken_shares_leaves_the_others():
    """Whichever sign of the shares is lost or doubled."""
    shares = "{\n  i: 1,\n  j: 2,\n }"
    for at in range(len(shares)):
        for broken in (shares[:at] + shares[at + 1 :], shares[:at] + shares[at] + shares[at:]):
            text = HEAD + f'pipeline p(b) {{\n a = x(k: {broken})\n c = z(1)\n}}\nmodel m = hf("x")'
            pipeline, model = parse(Source("a", text)).file.statements
            assert [s.name.path for s in pipeline.steps][-1:] == ["c"] and model.name.path == "m", broken
            assert len(said(text)) <= 1, broken


def test_a_broken_statement_leaves_the_others():
    text = HEAD + 'model a = hf("x"\ndata b text("y")\nparam c\nprofile d { isa: x }\nemit p { hf( }\nuse std.text'
    assert [type(s).__name__ for s in parse(Source("a", text)).file.statements] == ["Profile", "Emit", "Use"]
    assert len(said(text)) == 4


@pytest.mark.slow
def test_every_token_removed_costs_at_most_one_diagnostic():
    """No cascades, wherever a recipe breaks."""
    from pathlib import Path

    from effc.dsl.syntax.lexer import tokenize

    text = Path(__file__).with_name("tour.effspec").read_text()
    for token in tokenize(Source("a", text))[0][2:-1]:
        broken = text[: token.start_pos] + text[token.end_pos :]
        assert len(said(broken)) <= 1, f"without {token!r} of line {token.line}: {said(broken)}"


# Limits


def test_nesting_has_a_limit():
    nested = "model a = f(" + "[" * (DEPTH - 1) + "]" * (DEPTH - 1) + ")"
    assert said(HEAD + nested) == []
    assert said(HEAD + nested.replace("[]", "[[]]") + '\nmodel b = hf("x")') == [f"2:{13 + DEPTH} too-deep"]
    assert said(HEAD + "model a = f" + "(" * 100_000) == [f"2:{13 + DEPTH} too-deep"]


def test_a_file_of_mistakes_is_cut_off():
    found = parse(Source("a", HEAD + "model a =\n" * 1000)).diagnostics
    assert len(found) == MAX_ITEMS + 1 and found[-1].slug == "more-mistakes"


GARBAGE = ["(", "a ", '"', '"""\n', "{", "model\n", "x = 1, ", "}", "\\", "é", "[1 2 "]


@pytest.mark.parametrize("garbage", wide(GARBAGE, {"(", '"""\n', "x = 1, "}))
@pytest.mark.slow
def test_a_megabyte_of_garbage_takes_less_than_three_seconds(garbage):
    for size in (LIMIT - 100, 1_000_000):
        with own_time() as taken:
            assert said(HEAD + "model a = f(" + garbage * (size // len(garbage)))
            assert taken() < 3


# Files


def refusal(path) -> str:
    with pytest.raises(Reject) as caught:
        read_source(path)
    (diagnostic,) = caught.value.diagnostics
    return f"{diagnostic.slug} {diagnostic.exit}"


def test_files_that_are_no_recipes_are_refused(tmp_path):
    def file(data: bytes):
        path = tmp_path / "a.effspec"
        path.write_bytes(data)
        return path

    assert refusal(tmp_path / "none.effspec") == "no-recipe 2"
    assert refusal(tmp_path) == "recipe-is-folder 2"
    assert refusal(tmp_path / ("x" * 300)) == "unreadable-recipe 2"
    assert refusal(tmp_path / "a\0b") == "unreadable-recipe 2"
    assert refusal(file(b"\x7fELF\0\0")) == "binary-recipe 3"
    assert refusal(file("effspec 1\n# é".encode("latin-1"))) == "not-utf-8 3"
    assert refusal(file("effspec 1\n".encode("utf-16"))) == "not-utf-8 3"
    assert refusal(file(b" " * (LIMIT + 1))) == "recipe-too-large 3"
    assert read_source(file(b"\xef\xbb\xbfeffspec 1\r\n")).text == "effspec 1\r\n"
    assert refusal(file(b"\xef\xbb\xbfa\xff")) == "not-utf-8 3"


def test_the_byte_that_is_no_utf_8_is_counted_from_the_start_of_the_file(tmp_path):
    path = tmp_path / "a.effspec"
    path.write_bytes(b"\xef\xbb\xbfa\xff")
    with pytest.raises(Reject, match=r"byte 5 of .* \(line 1, column 2\)"):
        read_source(path)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.effspec")
    assert refusal(tmp_path / "pipe.effspec") == "unreadable-recipe 2"
    assert refusal("/dev/null") == "unreadable-recipe 2"


def test_a_near_name_is_offered(tmp_path):
    (tmp_path / "slim.effspec").write_text("effspec 1")
    with pytest.raises(Reject) as caught:
        read_source(tmp_path / "slmi.effspec")
    assert "slim.effspec" in caught.value.diagnostics[0].help


NOWHERE = read("model a = b()").statements[0].span


def name(path: str) -> ast.Name:
    return ast.Name(path, span=NOWHERE)

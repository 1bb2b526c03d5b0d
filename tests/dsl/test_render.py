"""Diagnostics as a person, a program and GitHub see them."""

import json
import re

import pytest
from effc.dsl.syntax.diagnostics import Diagnostic, Fault, Fix
from effc.dsl.syntax.excerpt import WIDTH
from effc.dsl.syntax.parse import parse
from effc.dsl.syntax.render import apply_fixes, render
from effc.dsl.syntax.source import Source, Span

out_of_range = Fault("test-out-of-range", "A parameter lies outside its bounds.")
warned = Fault("test-warning", "Something is odd.", severity="warning")

SLIM = Source(
    "slim.effspec",
    "effspec 1\n\nmodel base = hf('x')\n\npipeline lean(base) {\n"
    "  thin = prune.channels(keep: 0% of channels, data: calib)\n}\n",
)


def at(source: Source, text: str, nth: int = 0) -> Span:
    start = [m.start() for m in re.finditer(re.escape(text), source.text)][nth]
    return Span(source, start, start + len(text))


def shown(diagnostic: Diagnostic) -> str:
    return "\n" + render([diagnostic]) + "\n"


def test_a_fact_a_place_and_a_remedy():
    text = shown(
        out_of_range(
            "`keep` is 0% of channels, which leaves none",
            at(SLIM, "0%"),
            help="keep more than 0%, or remove whole blocks with `prune.blocks`",
        )
    )
    assert (
        text
        == """
error[test-out-of-range]: `keep` is 0% of channels, which leaves none
  --> slim.effspec:6:31
   6 |   thin = prune.channels(keep: 0% of channels, data: calib)
     |                               ^^
help: keep more than 0%, or remove whole blocks with `prune.blocks`
"""
    )


def test_a_label_related_places_and_other_files():
    other = Source("std/text.effspec", "effspec 1\ndata calib = text()\n")
    text = shown(
        warned(
            "two things are called `calib`",
            at(SLIM, "calib"),
            label="said here",
            note="the nearer one counts",
            related=((at(SLIM, "lean"), "in this pipeline"), (at(other, "calib"), "and here")),
        )
    )
    assert (
        text
        == """
warning[test-warning]: two things are called `calib`
  --> slim.effspec:6:53
   5 | pipeline lean(base) {
     |          ---- in this pipeline
   6 |   thin = prune.channels(keep: 0% of channels, data: calib)
     |                                                     ^^^^^ said here
  ::: std/text.effspec:2:6
   2 | data calib = text()
     |      ----- and here
note: the nearer one counts
"""
    )


def test_an_opener_far_above():
    source = Source("a.effspec", "effspec 1\npipeline p(b) {\n  a = x(k: 1)\n\nexpect p { q <= 3 }\n")
    assert (
        "\n" + render(parse(source).diagnostics) + "\n"
        == """
error[not-closed]: `{` is not closed
  --> a.effspec:5:1
   2 | pipeline p(b) {
     |               - opened here
 ...
   5 | expect p { q <= 3 }
     | ^^^^^^ `}` is expected before this
help: add `}`
"""
    )


def test_a_span_of_several_lines_shows_the_first():
    source = Source("a.effspec", "effspec 1\nmodel a = hf(\n  x: 1,\n)\n")
    assert (
        shown(warned("odd", Span(source, 10, 35)))
        == """
warning[test-warning]: odd
  --> a.effspec:2:1
   2 | model a = hf(
     | ^^^^^^^^^^^^^
 ...
"""
    )


def test_no_place_no_excerpt():
    assert (
        shown(warned("odd", help="first\nsecond"))
        == """
warning[test-warning]: odd
help: first
      second
"""
    )


@pytest.mark.parametrize(
    "line, marked, shown_line, carets",
    [
        ("\tx = bad", "bad", "    x = bad", "        ^^^"),
        ('"日本" bad', "bad", '"日本" bad', "       ^^^"),
        ("e\u0301 bad", "bad", "e\u0301 bad", "  ^^^"),
        ("a\x1b[31m bad", "bad", "a\ufffd[31m bad", "       ^^^"),
        ("a\u202ebad", "bad", "a\ufffdbad", "  ^^^"),
    ],
)
def test_carets_stand_under_what_they_mean(line, marked, shown_line, carets):
    source = Source("a", line)
    rows = render([warned("odd", at(source, marked))]).split("\n")
    assert rows[2:4] == [f"   1 | {shown_line}", f"     | {carets}"]


@pytest.mark.parametrize("place", [0, 60, 5_000, 9_990])
def test_long_lines_are_cropped_around_the_span(place):
    source = Source("a", "x" * place + "bad" + "y" * (10_000 - place))
    excerpt, carets = render([warned("odd", at(source, "bad"))]).split("\n")[2:4]
    assert len(excerpt) <= WIDTH + 9
    start = carets.index("^")
    assert excerpt[start : start + 3] == "bad" and carets.count("^") == 3
    assert excerpt.startswith("   1 | …") == (place > 50) and excerpt.endswith("…") == (place < 9_000)


def test_the_end_of_the_file_has_a_caret():
    source = Source("a", "model a =")
    assert render([warned("odd", Span(source, 9, 9))]).endswith("   1 | model a =\n     |          ^")
    assert render([warned("odd", Span(Source("b", ""), 0, 0))]).endswith("   1 |\n     | ^")


def test_the_gutter_grows_with_the_line_number():
    source = Source("a", "\n" * 12344 + "bad\n")
    assert render([warned("odd", at(source, "bad"))]).split("\n")[1:] == [
        "   --> a:12345:1",
        "12345 | bad",
        "      | ^^^",
    ]


def test_all_are_sorted_by_place_and_colored_on_demand():
    found = [warned("second", at(SLIM, "lean")), out_of_range("first", at(SLIM, "model")), warned("zeroth")]
    assert re.findall("zeroth|first|second", render(found)) == ["zeroth", "first", "second"]
    colored = render(found, color=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == render(found) != colored
    assert render([]) == "" and render([], "github") == ""


def test_json_for_programs():
    fix = Fix(at(SLIM, "0%"), "1%")
    found = [out_of_range("`keep` is 0%", at(SLIM, "0%"), fix=fix, related=((at(SLIM, "lean"), "here"),))]
    whole = json.loads(render(found, "json"))
    (said,) = whole["diagnostics"]
    assert (whole["schema_version"], whole["status"]) == (1, "refused")
    place = {"file": "slim.effspec", "line": 6, "column": 31, "end_line": 6, "end_column": 33}
    assert said == {
        "slug": "test-out-of-range",
        "severity": "error",
        **place,
        "message": "`keep` is 0%",
        "label": "",
        "help": "",
        "note": "",
        "related": [
            {"file": "slim.effspec", "line": 5, "column": 10, "end_line": 5, "end_column": 14, "message": "here"}
        ],
        "fixes": [{**place, "text": "1%"}],
    }
    assert json.loads(render([warned("odd")], "json"))["status"] == "ok"
    assert json.loads(render([], "json"))["diagnostics"] == []


def test_github_commands_are_escaped():
    source = Source("a,b:c%.effspec", "x\nyy")
    said = out_of_range("is 0%,\nso: none", Span(source, 2, 4), help="keep more", note="100% is all")
    assert render([said], "github") == (
        "::error file=a%2Cb%3Ac%25.effspec,line=2,col=1,endColumn=3,title=test-out-of-range"
        "::is 0%25,%0Aso: none%0Anote: 100%25 is all%0Ahelp: keep more"
    )
    assert render([warned("odd", Span(source, 0, 4))], "github").startswith(
        "::warning file=a%2Cb%3Ac%25.effspec,line=1,col=1,endLine=2,title"
    )


def test_fixes_are_put_in_and_overlapping_ones_left():
    source = Source("a", "one two three")
    fixes = [Fix(at(source, "two"), "2"), Fix(at(source, "two three"), "23"), Fix(Span(source, 0, 0), "0 ")]
    other = Fix(Span(Source("b", "other"), 0, 1), "X")
    found = [warned("odd", fix=fix) for fix in [*fixes, other]]
    assert apply_fixes(source.text, found) == "0 one 2 three"

"""The one canonical text of a recipe."""

from pathlib import Path

import pytest
from effc.dsl.syntax.diagnostics import Reject
from effc.dsl.syntax.format import COLUMNS, format_file, format_source
from effc.dsl.syntax.parse import parse
from effc.dsl.syntax.source import Source
from effc.dsl.syntax.write import display_width, quoted


def canonical(text: str) -> str:
    made = format_source(Source("a", text))
    assert format_source(Source("a", made)) == made
    return made


def test_the_tour(golden):
    golden(canonical(Path(__file__).with_name("tour.effspec").read_text()), "tour.effspec")


def test_layout_is_normal():
    assert (
        canonical(
            'effspec 1 """d"""use a.b\nparam  k:int=8 in[8,16,]"s"\nmodel m=f( "x",a :1 , )data d=g()\n\n\n'
            "profile p{a:1 b:[2,3]}profile q{}matrix{k:[1]}\nmatrix{k:[1] l:[2]}pipeline r(m){a=f() \n\n\n b=g(x|y)}"
            'expect r{a<=1*m on p\nb in 1..2}emit r{hf("x")native()}'
        )
        == '''\
effspec 1
"""d"""

use a.b

param k: int = 8 in [8, 16] "s"

model m = f("x", a: 1)
data d = g()

profile p { a: 1  b: [2, 3] }
profile q {}

matrix k: [1]
matrix { k: [1]  l: [2] }

pipeline r(m) {
  a = f()

  b = g(x | y)
}

expect r {
  a <= 1 * m on p
  b in 1..2
}

emit r {
  hf("x")
  native()
}
'''
    )


def test_comments_stay_where_they_belong():
    text = '''\
# licence

effspec 1  # edition
# before the doc
"""Doc
 more"""
# after the doc

# alone

use std.text  # trailing

# about keep
param keep: ratio = 85%  # how much

model base = hf(  # open
  # first
  "x",  # one
  # second
  a: 3,  # two
  # last
)  # closed

pipeline p(base) {  # brace
  # top
  a = x(
    b: [
      1,  # unit
      2,
    ],
    c: f(
      # nothing yet
    ),
  )  # end of a

  # alone in the block

  b = y()  # end of b
  # bottom
}

# between

expect p {
  # nothing yet
}

profile q {
  a: 1  # why
  b: 2
}
# end
'''
    assert canonical(text) == text


def test_comments_in_odd_places_move_before_what_they_are_in():
    assert (
        canonical("effspec 1\nmodel # m\n base = # n\n hf(a: # one\n 1 # two\n | # three\n 2)")
        == """\
effspec 1

# m
# n
model base = hf(
  # one
  # two
  # three
  a: 1 | 2,
)
"""
    )


def test_long_calls_have_an_argument_per_line():
    call = f'model m = f("{"x" * 30}", b: "{"y" * 30}", c: 1)'
    assert len(call) < COLUMNS and call in canonical(f"effspec 1 {call}")
    longer = call.replace("c: 1", 'c: "日日日日日日日"')
    assert display_width(longer) > COLUMNS > len(longer)
    assert canonical(f"effspec 1 {longer}").count("\n") == 7


@pytest.mark.parametrize(
    "value, short, long",
    [
        ("plain é 日 😀", '"plain é 日 😀"', '"""plain é 日 😀"""'),
        ('a"b\\', '"a\\"b\\\\"', '"""a"b\\\\"""'),
        ("a\nb\tc\r", '"a\\nb\\tc\\r"', '"""a\nb\tc\\r"""'),
        ('""" "', '"\\"\\"\\" \\""', '"""""\\" \\""""'),
        ("\u200b\u202e\ufeff", '"\\u200b\\u202e\\ufeff"', '"""\\u200b\\u202e\\ufeff"""'),
        ("", '""', '""""""'),
    ],
)
def test_strings_are_escaped_no_more_than_needed(value, short, long):
    assert (quoted(value), quoted(value, multiline=True)) == (short, long)
    for written in (short, long):
        assert parse(Source("a", f"effspec 1 {written}")).file.doc.value == value


def test_numbers_keep_digits_and_unit():
    for number in ("1_000", "0.80", "3e-4", "85%", "24GiB", "-1", "007"):
        assert f"f({number})" in canonical(f"effspec 1 model a = f({number})")


def test_files_with_syntax_errors_are_refused():
    with pytest.raises(Reject) as caught:
        format_source(Source("a", "effspec 1\nmodel a = hf(x=1)"))
    assert [d.slug for d in caught.value.diagnostics] == ["wrong-sign"]


def test_windows_line_ends_become_plain_ones():
    text = 'effspec 1\r\n"""a\r\nb"""\r\n# c\r\nuse x  # d\r\n'
    assert canonical(text) == 'effspec 1\n"""a\nb"""\n\n# c\nuse x  # d\n'


def test_a_tree_without_a_place_is_written_too():
    file = parse(Source("a", "effspec 1 pipeline p(m) { a = f(1) }")).file
    assert format_file(file) == "effspec 1\n\npipeline p(m) {\n  a = f(1)\n}\n"
